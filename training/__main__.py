"""elbow-train: data -> train -> evaluate -> report -> export."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; its exit code is the process's. Errors a user can act on are one line on stderr."""
    parser = argparse.ArgumentParser(prog="elbow-train", description="Make, measure and export Elbow's models.")
    commands = parser.add_subparsers(dest="command", required=True)

    from training.data import cli as data

    data.add_parser(commands)
    train = commands.add_parser("train", help="train a run; the same command resumes it")
    train.add_argument("run", help="a name in training/runs, for example digits-tiny")
    train.add_argument("--output", type=Path, help="folder of the run (default runs/NAME)")
    train.add_argument("--seed", type=int)
    train.add_argument("--device", default="cpu", help="cpu or cuda")
    train.add_argument("--threads", type=int, help="CPU threads of torch")
    train.add_argument("--data", help="folder with the data sets (default: ELBOW_DATA)")
    train.set_defaults(action=_train)

    args = parser.parse_args(argv)
    try:
        return data.run(args) if args.command == "data" else args.action(args)
    except KeyboardInterrupt:
        return 130
    except _user_errors() as exc:
        print(f"elbow-train: {exc}", file=sys.stderr)
        return 1


def _train(args: argparse.Namespace) -> int:
    import torch

    from training.loop import Trainer, fabric_for
    from training.runs import RUNS

    if args.run not in RUNS:
        print(f"elbow-train: run {args.run!r} is unknown: one of {', '.join(RUNS)}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    run = RUNS[args.run]()
    if args.seed is not None:
        run = replace(run, seed=args.seed)
    fabric = fabric_for(run, args.device)
    fabric.launch()
    Trainer(run, args.output or Path("runs") / run.name, fabric, args.data).fit()
    return 0


def _user_errors() -> tuple[type[Exception], ...]:
    from training.checkpoint import CheckpointError
    from training.data.errors import DataError
    from training.loop import TrainingFailed

    return (CheckpointError, DataError, TrainingFailed)


if __name__ == "__main__":
    sys.exit(main())
