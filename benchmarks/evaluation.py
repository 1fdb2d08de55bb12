"""What the shipped models are worth: `elbow-train evaluate` on the artifacts in checkpoints/, kept with machine, date and commit.

    ELBOW_DATA=… python benchmarks/evaluation.py [--rows 5000] [--importance-rows 5000] [--gap-rows 500] [--threads 2]

The last 5,000 training images of MNIST, dynamically binarised once with a fixed seed; about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from _report import keep

from training.checkpoint import load_static
from training.evaluate import Effort, evaluate, table

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
    evaluations = [evaluate(*load_static(path), effort, args.data) for path in args.artifacts]
    print(text := table(evaluations))
    keep("evaluation", {"effort": asdict(effort), "evaluations": [asdict(e) for e in evaluations], "table": text})


if __name__ == "__main__":
    main()
