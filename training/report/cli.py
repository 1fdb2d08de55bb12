"""`elbow-train report CHECKPOINT`: the figures as PNG, one HTML page, and the numbers as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from training.options import natural, positive


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `report` to the command line of `elbow-train`."""
    parser = subparsers.add_parser("report", help="draw the figures of an iterative or a sequence model: PNG, one HTML page, report.json")
    parser.add_argument("checkpoint", type=Path, help="folder of an iterative or sequence checkpoint, or of its run")
    parser.add_argument("--landscape", type=Path, metavar="CHECKPOINT", help="an iterative model with z = 2 (run mnist-landscape)")
    parser.add_argument("--direct", type=Path, metavar="CHECKPOINT", help="a direct model of the same data, to compare with")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where to write (default: report/ in CHECKPOINT)")
    parser.add_argument(
        "--rows", type=positive, help="validation rows of the race against optimisers (default 500; half of what there is, if that is less)"
    )
    parser.add_argument("--digit", type=natural, metavar="ROW", help="validation row of the landscape (default 0)")
    parser.add_argument("--optimum", action="store_true", help="also search each row's optimum, a dotted line (minutes)")
    parser.add_argument("--threads", type=positive, help="CPU threads of torch")
    parser.add_argument("--data", help="folder with the data sets (default: ELBOW_DATA)")
    parser.set_defaults(action=run)


def run(args: argparse.Namespace) -> int:
    """The exit status. Raises what `training.__main__` reports in one line: CheckpointError, DataError, OptionError, ReportError."""
    import torch

    from models.catalogue import FilterModel
    from training.checkpoint import load_weights
    from training.options import refuse_given
    from training.report.make import Effort, Report
    from training.report.make_filter import write_filter_report
    from training.report.race import RaceEffort

    if args.threads:
        torch.set_num_threads(args.threads)
    asked = {} if args.rows is None else {"rows": args.rows}
    effort = Effort(RaceEffort(**asked, with_optimum=args.optimum), landscape_row=args.digit or 0)
    folder = args.to or args.checkpoint / "report"
    if isinstance(load_weights(args.checkpoint)[0], FilterModel):
        static = ("landscape", "direct", "rows", "digit", "optimum")
        refuse_given(args, static, f"{args.checkpoint} is a sequence model, and this is of static models")
        print(write_filter_report(args.checkpoint, folder, args.data))
        return 0
    companions = {"z2": args.landscape, "direct": args.direct}
    print(Report(args.checkpoint, folder, **companions, effort=effort, fewer_rows=args.rows is None, data_root=args.data).write())
    return 0
