"""elbow-train: data -> train -> evaluate -> report -> export."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.options import OptionError, natural, positive, refuse_given, seconds, seed

if TYPE_CHECKING:
    from training.config import RunConfig
    from training.data.images import Images
    from training.data.sequences import Sequences
    from training.sequence_config import SequenceRunConfig


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; its exit code is the process's. Errors a user can act on are one line on stderr."""
    parser = argparse.ArgumentParser(prog="elbow-train", description="Make, measure and export Elbow's models.")
    commands = parser.add_subparsers(dest="command", required=True)

    from training.data import cli as data
    from training.report import cli as report

    data.add_parser(commands)
    _add_train(commands)
    evaluate = commands.add_parser("evaluate", help="measure checkpoints side by side, on validation rows")
    evaluate.add_argument("checkpoint", type=Path, nargs="+", help="folders of checkpoints, of runs, or of artifacts")
    of_static, of_filter = "of a static model: ", "of a sequence model: "
    evaluate.add_argument("--rows", type=positive, help=f"{of_static}validation rows of the ELBO (default 5000)")
    evaluate.add_argument("--importance-rows", type=natural, help=f"{of_static}rows of the 5,000-sample log p(x) (default 1000; 0: none)")
    evaluate.add_argument("--gap-rows", type=natural, help=f"{of_static}rows of the amortization gap (default 500; 0: none)")
    evaluate.add_argument("--split", help=f"{of_filter}valid (the default), or test where the data set keeps it")
    evaluate.add_argument("--particles", type=positive, help=f"{of_filter}particles of the FIVO bound (default 16)")
    evaluate.add_argument("--steps", type=natural, nargs="+", help=f"{of_filter}other numbers of steps per frame, too")
    evaluate.add_argument("--threads", type=positive)
    evaluate.add_argument("--data", help="folder with the data sets (default: ELBOW_DATA)")
    evaluate.set_defaults(action=_evaluate)
    report.add_parser(commands)
    export = commands.add_parser("export", help="make the artifact that the service loads")
    export.add_argument("checkpoint", type=Path)
    export.add_argument("--to", type=Path, default=Path("checkpoints"), help="model repository (default checkpoints)")
    export.add_argument("--name", required=True, help="name it is served under")
    export.add_argument("--version", default="1")
    export.add_argument("--rows", type=positive, default=5000, help="rows of the validation curve and the training quantiles")
    export.add_argument("--likelihood", help="quantised_gaussian: serve a speech model trained on densities by 16-bit mass")
    export.add_argument("--int8", action="store_true", help="of a static model: offer int8 beside float32, at most 0.05 nats below it")
    export.add_argument("--threads", type=positive)
    export.add_argument("--data", help="folder with the data sets (default: ELBOW_DATA)")
    export.set_defaults(action=_export)
    _add_remakers(commands)

    args = parser.parse_args(argv)
    try:
        return data.run(args) if args.command == "data" else args.action(args)
    except KeyboardInterrupt:
        return 130
    except _user_errors() as exc:
        said = f"{exc.filename}: {exc.strerror}" if isinstance(exc, OSError) and exc.filename else str(exc)
        print(f"elbow-train: {said}", file=sys.stderr)
        return 1


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train a run; the same command resumes it")
    train.add_argument("run", help="a name in training/runs, for example digits-tiny")
    train.add_argument(
        "--output", type=Path, help="folder of the run (default runs/NAME); a run that another one begins from is looked for beside it"
    )
    train.add_argument("--seed", type=seed)
    train.add_argument("--epochs", type=positive, metavar="N", help="so many epochs instead of the run's own; its schedule follows")
    train.add_argument("--seconds", type=seconds, help="of a sequence model: train for so many seconds of updates, instead of --epochs")
    train.add_argument("--device", default="cpu", help="cpu or cuda")
    train.add_argument(
        "--precision",
        choices=("32-true", "bf16-mixed"),
        help="of matrix products (default: the run's own; float32 on a CPU that is slow at bfloat16)",
    )
    train.add_argument("--processes", type=positive, help="that share out each batch: one per card (default: all cards; on the CPU 1)")
    train.add_argument("--threads", type=positive, help="CPU threads of torch, of each process")
    train.add_argument("--data", help="folder with the data sets (default: ELBOW_DATA)")
    train.add_argument(
        "--on", metavar="DATA", help="learn from this set instead of the run's own: a name of `elbow-train data`, folder:PATH …"
    )
    train.add_argument("--size", type=_size, metavar="HxW", help="of --on folder:PATH: stretch the images to this height and width")
    train.add_argument("--frame-size", type=positive, help="of recordings: samples per frame (default: the run's, 200)")
    train.add_argument("--steps-per-beat", type=positive, help="of --on midi:FOLDER: frames per quarter note (default 2)")
    train.set_defaults(action=_train)


def _add_remakers(commands: Any) -> None:
    """What makes an artifact out of another one."""
    retrace = commands.add_parser("retrace", help="make an artifact's TorchScript again with the torch installed here; needs no data")
    retrace.add_argument("artifact", type=Path, nargs="+")
    retrace.add_argument("--to", type=Path, required=True, help="model repository to write to")
    retrace.set_defaults(action=_retrace)
    quantise = commands.add_parser("quantise", help="offer int8 beside an artifact's float32, at most 0.05 nats below it")
    quantise.add_argument("artifact", type=Path, nargs="+")
    quantise.add_argument("--to", type=Path, required=True, help="model repository to write to")
    quantise.add_argument("--rows", type=positive, default=5000, help="validation rows that the cost is measured on")
    quantise.add_argument("--threads", type=positive)
    quantise.add_argument("--data", help="folder with the data sets (default: ELBOW_DATA)")
    quantise.set_defaults(action=_quantise)


def _train(args: argparse.Namespace) -> int:
    from training.bfloat16 import suited
    from training.loop import Trainer
    from training.run_loop import RunLoop, fabric_for
    from training.runs import RUNS
    from training.sequence_config import SequenceRunConfig
    from training.sequence_loop import SequenceTrainer

    if args.run not in RUNS:
        print(f"elbow-train: run {args.run!r} is unknown: one of {', '.join(RUNS)}", file=sys.stderr)
        return 2
    _set_threads(args.threads)
    run = RUNS[args.run]()
    if args.seed is not None:
        run = replace(run, seed=args.seed)
    if args.seconds is not None and not isinstance(run, SequenceRunConfig):
        print(f"elbow-train: --seconds is for sequence models; {run.name} ends after its epochs", file=sys.stderr)
        return 2
    if args.seconds is not None and args.epochs is not None:
        raise OptionError("--epochs, --seconds: a run ends after the one or the other: leave one out")
    if args.epochs is not None:
        run = replace(run, epochs=args.epochs)
    run = suited(run, args.device) if args.precision is None else replace(run, precision=args.precision)
    fabric = fabric_for(args.device, args.processes)
    fabric.launch()
    loop: RunLoop
    if isinstance(run, SequenceRunConfig):
        sequence_run, sequences = _sequences(args, run if args.seconds is None else replace(run, seconds=args.seconds))
        if sequences.left_out and fabric.global_rank == 0:
            print(f"{sequence_run.data.name}: {sequences.left_out}", file=sys.stderr)
        loop = SequenceTrainer(sequence_run, args.output or Path("runs") / sequence_run.name, fabric, sequences=sequences)
    else:
        static_run, images = _images(args, run)
        loop = Trainer(static_run, args.output or Path("runs") / static_run.name, fabric, images=images)
    loop.fit()
    if args.on is not None and fabric.global_rank == 0:
        print(f"{loop.config.name}, trained on {loop.config.data.name}: {loop.folder}")
    return 0


def _images(args: argparse.Namespace, run: RunConfig) -> tuple[RunConfig, Images]:
    """The run and its data, on another set where one is asked for."""
    from training.own_data import on_images

    refuse_given(args, ("frame_size", "steps_per_beat"), f"{run.name} learns from images")
    if args.on is None and args.size is None:
        return run, run.data.load(args.data)
    return on_images(run, args.on or run.data.name, args.data, args.size)


def _sequences(args: argparse.Namespace, run: SequenceRunConfig) -> tuple[SequenceRunConfig, Sequences]:
    """The run and its data, on another set where one is asked for."""
    from training.own_data import on_sequences

    refuse_given(args, ("size",), f"{run.name} learns from sequences")
    if args.on is None and args.frame_size is None and args.steps_per_beat is None:
        return run, run.data.load(args.data)
    return on_sequences(run, args.on or run.data.name, args.data, args.frame_size, args.steps_per_beat)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return positive(height), positive(width)


def _evaluate(args: argparse.Namespace) -> int:
    from models.artifact import CARD
    from models.catalogue import FilterModel
    from training.checkpoint import load_static, load_weights
    from training.evaluate import Effort, evaluate, save, table

    _set_threads(args.threads)
    if isinstance(load_weights(args.checkpoint[0])[0], FilterModel):
        return _evaluate_filters(args)
    refuse_given(args, ("split", "particles", "steps"), f"{args.checkpoint[0]} is a static model, and this is of sequence models")
    effort = Effort(**_given(args, "rows", "importance_rows", "gap_rows"))
    evaluations = []
    # all first: the last must not be refused when the others were measured for minutes
    for folder, (model, run, facts) in [(folder, load_static(folder)) for folder in args.checkpoint]:
        evaluations.append(evaluate(model, run, facts, effort, args.data))
        if not (folder / CARD).exists():  # an artifact's folder never changes
            save(evaluations[-1], folder)
    print(table(evaluations))
    return 0


def _evaluate_filters(args: argparse.Namespace) -> int:
    from models.artifact import CARD
    from training.checkpoint import load_filter
    from training.evaluate_filter import FilterEffort, evaluate_filter, save, table

    refuse_given(args, ("rows", "importance_rows", "gap_rows"), f"{args.checkpoint[0]} is a sequence model, and this is of static models")
    effort = FilterEffort(steps=tuple(args.steps or ()), **_given(args, "particles"))
    evaluations = []
    for folder, (model, run, facts) in [(folder, load_filter(folder)) for folder in args.checkpoint]:
        evaluations.append(evaluate_filter(model, run, facts, effort, split=args.split or "valid", data_root=args.data))
        if not (folder / CARD).exists():
            save(evaluations[-1], folder)
    print(table(evaluations))
    return 0


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those options that were given, for defaults that lie elsewhere."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _export(args: argparse.Namespace) -> int:
    from training.export import export

    _set_threads(args.threads)
    options = {"rows": args.rows, "likelihood": args.likelihood, "int8": args.int8, "data_root": args.data}
    print(export(args.checkpoint, args.to, args.name, args.version, **options))
    return 0


def _retrace(args: argparse.Namespace) -> int:
    from training.retrace import retrace

    for artifact in args.artifact:
        print(retrace(artifact, args.to))
    return 0


def _quantise(args: argparse.Namespace) -> int:
    from training.precision import quantise

    _set_threads(args.threads)
    for artifact in args.artifact:
        print(quantise(artifact, args.to, rows=args.rows, data_root=args.data))
    return 0


def _set_threads(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def _user_errors() -> tuple[type[Exception], ...]:
    from models.artifact import ArtifactError
    from training.checkpoint import CheckpointError
    from training.data.errors import DataError
    from training.export_files import ExportError
    from training.report.subject import ReportError
    from training.run_loop import TrainingFailed

    return (ArtifactError, CheckpointError, DataError, ExportError, OptionError, ReportError, TrainingFailed, OSError)


if __name__ == "__main__":
    sys.exit(main())
