"""What the shipped models are worth: `elbow-train evaluate` on the artifacts in checkpoints/, kept with machine, date and commit.

    ELBOW_DATA=… python benchmarks/evaluation.py [--rows 5000] [--importance-rows 5000] [--gap-rows 500] [--threads 2]

Folders of runs may be named instead: each then gets its evaluation.json too, as by `elbow-train evaluate`, for the export.

The last 5,000 training images of MNIST, dynamically binarised once with a fixed seed; about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from _report import keep

from models.artifact import CARD
from training.checkpoint import load_static
from training.evaluate import Effort, evaluate, save, table

SHIPPED = [Path(__file__).parents[1] / "checkpoints" / name / "1" for name in ("mnist-direct", "mnist-iterative")]


def main() -> None:
    """Prints the table and keeps it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="*", type=Path, default=SHIPPED)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--importance-rows", type=int, default=5000)
    parser.add_argument("--gap-rows", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", help="folder with the data sets (default: ELBOW_DATA)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    effort = Effort(rows=args.rows, importance_rows=args.importance_rows, gap_rows=args.gap_rows)
    evaluations = []
    for path in args.artifacts:
        evaluations.append(evaluate(*load_static(path), effort, args.data))
        if not (path / CARD).exists():  # an artifact's folder never changes
            save(evaluations[-1], path)
    print(text := table(evaluations))
    keep("evaluation", {"effort": asdict(effort), "evaluations": [asdict(e) for e in evaluations], "table": text})


if __name__ == "__main__":
    main()
