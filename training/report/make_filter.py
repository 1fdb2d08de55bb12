"""`elbow-train report` of a sequence model: what it predicts, how inference corrects it, and what each step is worth."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from training.checkpoint import data_of, load_filter
from training.records import write_json, write_text
from training.report import style
from training.report.filtering import FramesSeen, Gains, frames_seen, gains
from training.report.page import Entry, page
from training.report.subject import made_by

MOST_STEPS = 16
WAVE_FRAMES, ROLL_FRAMES = 6, 60
GAIN_SEQUENCES, GAIN_FRAMES = 64, 60
BAND = "#D55E00"


def write_filter_report(checkpoint: Path, folder: Path, data_root: str | None = None) -> Path:
    """Writes the PNGs, report.json and index.html; the path of the page.

    Raises:
        DataError: the data are not those that the checkpoint was trained on.
    """
    model, run, facts = load_filter(checkpoint)
    sequences = data_of(run, facts, data_root)
    steps = run.refinement.steps if model.inference.refines else 0
    folder.mkdir(parents=True, exist_ok=True)
    origin = made_by()
    entries, numbers = [], {}

    def add(name: str, title: str, caption: str, figure: Figure, data: Any) -> None:
        png = style.save(figure, folder / f"{name}.png")
        entries.append(Entry(title, png, f"{caption} [{run.name}; commit {origin['commit']}; {origin['date']}]"))
        numbers[name] = {"file": png.name, "caption": caption, "data": data}

    longest = max(range(len(sequences.valid)), key=lambda i: len(sequences.valid[i]))
    sequence = sequences.valid[longest]
    if sequences.kind == "binary":
        first = int(np.argmax(sequence.any(1)))  # a piece may begin with a long rest
        seen = frames_seen(model, sequence, first, ROLL_FRAMES, steps)
        words = (
            f"Frames {first} to {first + len(seen.x) - 1} of validation sequence {longest}: notes played, and the probability of each note "
            f"as predicted before the frame was seen, and after {steps} inference step(s), at the mean of q."
        )
        add("piano_roll", "Piano roll: predicted, corrected, played", words, piano_roll(seen), {"elbo": seen.elbo.tolist()})
    else:
        loud = int(np.argmax([np.abs(sequence[t : t + WAVE_FRAMES]).mean() for t in range(max(1, len(sequence) - WAVE_FRAMES))]))
        seen = frames_seen(model, sequence, loud, WAVE_FRAMES, steps)
        words = (
            f"Frames {loud} to {loud + len(seen.x) - 1} of validation sequence {longest}: the data, and mean ± 1 std of p(x|z) at "
            "the mean of q before the first inference step (the prediction) and after each."
        )
        add("waveform", "Waveform: predicted and corrected", words, waveform(seen, sequences.sample_rate), {"elbo": seen.elbo.tolist()})
    worth = gains(model, sequences.valid, steps, MOST_STEPS, run.refinement.samples, GAIN_SEQUENCES, GAIN_FRAMES)
    words = (
        f"Mean free energy of {worth.frames} validation frames: within a frame after each of its {steps} steps (trained K), and when every "
        "frame gets so many steps; one sample, fresh noise."
    )
    add("free_energy_by_steps", "Free energy against inference steps", words, by_steps(worth), asdict(worth))
    if steps:
        total = worth.within[-1] - worth.within[0]
        words = f"Share of a frame's whole gain over its prediction ({total:.2f} nats) that each inference step brings."
        add("gain_by_step", "Gain by step", words, by_gain(worth), {"within": worth.within})
    report = {"made": origin, "checkpoint": {"run": run.name, **facts}, "figures": numbers}
    write_json(folder / "report.json", report)
    listed = {"checkpoint": run.name, "epoch": facts.get("epoch"), "data": f"{sequences.name}, sha256 {sequences.sha256[:16]}…", **origin}
    return write_text(folder / "index.html", page(f"Filtering: {run.name}", listed, entries))


def waveform(seen: FramesSeen, sample_rate: int | None) -> Figure:
    """One panel per number of steps: data over the band of mean ± std."""
    rows = seen.mean.shape[1]
    made = style.figure(height=1.6 * rows + 0.6)
    time = np.arange(seen.x.size) * (1e3 / sample_rate if sample_rate else 1.0)
    for k in range(rows):
        axes = made.add_subplot(rows, 1, k + 1)
        mean, std = seen.mean[:, k].ravel(), seen.std[:, k].ravel()
        axes.fill_between(time, mean - std, mean + std, color=BAND, alpha=0.25, linewidth=0, label="± 1 std")
        axes.plot(time, mean, color=BAND, linewidth=1.2, label="mean of p(x|z)")
        axes.plot(time, seen.x.ravel(), color=style.INK, linewidth=0.8, label="data")
        title = "prediction" if k == 0 else f"after {k} step{'s' if k > 1 else ''}"
        style.dress(axes, x="ms" if k == rows - 1 else "", y="", title=f"{title}, {seen.elbo[:, k].mean():.1f} nats per frame")
        if k == 0:
            axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper right")
    return made


def piano_roll(seen: FramesSeen) -> Figure:
    """Probabilities before and after inference, and the notes."""
    made = style.figure(height=7.0)
    played = np.flatnonzero(seen.x.any(0))
    low, high = (max(0, int(played.min()) - 3), int(played.max()) + 4) if len(played) else (0, seen.x.shape[1])
    last = seen.mean.shape[1] - 1
    for row, (values, title) in enumerate(
        (
            (seen.mean[:, 0], f"predicted, {seen.elbo[:, 0].mean():.2f} nats per frame"),
            (seen.mean[:, last], f"after {last} step{'s' if last != 1 else ''}, {seen.elbo[:, last].mean():.2f} nats per frame"),
            (seen.x, "played"),
        )
    ):
        axes = made.add_subplot(3, 1, row + 1)
        axes.imshow(
            values[:, low:high].T, origin="lower", aspect="auto", cmap="Greys", vmin=0, vmax=1, extent=(0, len(values), low + 21, high + 21)
        )
        style.dress(axes, x="frame" if row == 2 else "", y="MIDI note", title=title)
        axes.grid(False)
    return made


def by_steps(worth: Gains) -> Figure:
    made = style.figure()
    axes = made.add_subplot()
    axes.plot(worth.steps, [-value for value in worth.across], "o-", color=BAND, linewidth=2, label="every frame gets so many steps")
    axes.plot(range(len(worth.within)), [-v for v in worth.within], "s--", color="#0072B2", label="within a frame, trained K")
    style.dress(axes, x="inference steps", y="free energy, nats per frame")
    axes.legend(frameon=False, fontsize=9)
    return made


def by_gain(worth: Gains) -> Figure:
    made = style.figure(height=3.2)
    axes = made.add_subplot()
    total = worth.within[-1] - worth.within[0]
    shares = np.diff(worth.within) / total * 100 if total else np.zeros(len(worth.within) - 1)
    axes.bar(range(1, len(worth.within)), shares, color=BAND, width=0.6)
    style.dress(axes, x="inference step", y="% of the frame's gain")
    axes.set_xticks(range(1, len(worth.within)))
    return made
