"""Own filters beside amortized variational filtering, at equal training seconds.

    python benchmarks/filters.py [--runs runs/filters] [--sets jsb speech nottingham] [--evaluate-only]

Trains what is not finished yet (the same command goes on after an interruption), each run on one CPU thread for the same
seconds of processor time, its learning rate going to zero within them, and measures the best validation checkpoint of each:

    JSB, seeds 0 to 2, and Nottingham, seed 0: own filter, AVF with 1 step, AVF with 5 steps (SRNN, training/runs/music.py)
    speech (fsdd): own filter, AVF with 1, 2, 4 and 8 steps (VRNN, training/runs/speech.py)

Free energies in nats per frame, whole validation sequences (JSB: test too), frames alike with the first one scored, and "as
published": mean over sequences of the sum over frames 2 … T divided by T (Marino, Cvitkovic & Yue 2018, whose test figures
stand beside it). Speech counts densities of standardised samples, and 16-bit masses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _report import RESULTS, keep, table, where_and_when

from training.checkpoint import load_filter
from training.evaluate_filter import FilterEffort, FilterEvaluation, evaluate_filter

METHODS = {"jsb": ("own", "avf1", "avf5"), "nottingham": ("own", "avf1", "avf5"), "speech": ("own", "avf1", "avf2", "avf4", "avf8")}
SEEDS = {"jsb": (0, 1, 2), "nottingham": (0,), "speech": (0,)}
SECONDS = {"jsb": 400.0, "nottingham": 600.0, "speech": 420.0}
PUBLISHED = {"jsb-own": 6.92, "jsb-avf5": 6.77, "nottingham-own": 3.19, "nottingham-avf1": 3.13}
EFFORT = FilterEffort(seeds=2, particle_sequences=8, gap_sequences=8, gap_frames=4)


def train(name: str, seed: int, folder: Path, seconds: float, data: str | None) -> None:
    """A process of its own, so that nothing of one run is in another's memory."""
    if (folder / "final").exists():
        return
    command = [sys.executable, "-m", "training", "train", name, "--seed", str(seed), "--seconds", str(seconds), "--threads", "1"]
    subprocess.run([*command, "--output", str(folder), *(["--data", data] if data else [])], check=True)


def measured(folder: Path, data: str | None, split: str) -> FilterEvaluation:
    model, run, facts = load_filter(folder)
    return evaluate_filter(model, run, facts, EFFORT, split=split, data_root=data, quiet=True)


def last_line(folder: Path) -> dict[str, Any]:
    line: dict[str, Any] = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "filters")
    parser.add_argument("--sets", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--evaluate-only", action="store_true", help="only runs that are finished already")
    parser.add_argument("--data", help="folder of data sets (default: as elbow-train finds them)")
    args = parser.parse_args()
    rows, kept = [], {}
    for data_set in args.sets:
        for method in METHODS[data_set]:
            name = f"{data_set}-{method}"
            found: dict[str, list[FilterEvaluation]] = {}
            trained = []
            for seed in SEEDS[data_set]:
                folder = args.runs / f"{name}-s{seed}"
                if not args.evaluate_only:
                    train(name, seed, folder, SECONDS[data_set], args.data)
                if not (folder / "final").exists():
                    continue
                trained.append(last_line(folder))
                for split in ("valid", "test") if data_set == "jsb" else ("valid",):
                    found.setdefault(split, []).append(measured(folder, args.data, split))
                print(f"{name} seed {seed}: {-found['valid'][-1].elbo.frames:.3f}", flush=True)
            for split, evaluations in found.items():
                free = [-e.elbo.frames for e in evaluations]
                masses = [-e.quantised.frames for e in evaluations if e.quantised]
                rows.append(
                    (
                        name,
                        split,
                        len(evaluations),
                        statistics.mean(line["epoch"] for line in trained),
                        statistics.mean(e.epochs for e in evaluations),
                        f"{statistics.mean(free):.3f}",
                        f"{max(free) - min(free):.3f}",
                        f"{statistics.mean(-e.elbo.published for e in evaluations):.3f}",
                        PUBLISHED.get(name, "—"),
                        f"{statistics.mean(masses):.2f}" if masses else "—",
                        f"{statistics.mean(-e.bound for e in evaluations):.3f}",
                    )
                )
                kept[f"{name} {split}"] = [asdict(e) for e in evaluations]
            kept[f"{name} training"] = [{k: line[k] for k in ("epoch", "updates", "training_seconds")} for line in trained]
    columns = (
        "run",
        "split",
        "seeds",
        "epochs",
        "best at",
        "frames alike",
        "range",
        "as published",
        "their test",
        "16-bit mass",
        "FIVO, N = 16",
    )
    print("free energy, nats per frame; equal training seconds: " + ", ".join(f"{s} {SECONDS[s]:.0f}" for s in args.sets))
    print(table(columns, rows))
    sets = others(args.sets) | {data_set: measured_now(data_set, kept) for data_set in args.sets}
    print(f"kept in {keep('filters', {'sets': sets})}")


def measured_now(data_set: str, kept: dict[str, Any]) -> dict[str, Any]:
    """What was found of a set, and when: sets may be measured on different days."""
    runs = {name: value for name, value in kept.items() if name.startswith(f"{data_set}-")}
    return {"seconds": SECONDS[data_set], **where_and_when(), "runs": runs}


def others(data_sets: list[str]) -> dict[str, Any]:
    """What is kept of the sets that were not asked for."""
    file = RESULTS / "filters.json"
    sets: dict[str, Any] = json.loads(file.read_text()).get("sets", {}) if file.exists() else {}
    return {name: found for name, found in sets.items() if name not in data_sets}


if __name__ == "__main__":
    main()
