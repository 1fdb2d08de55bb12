"""Measured data -> matplotlib Figure: one function a figure, nothing measured here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from training.report.history import History
from training.report.landscape import LIMIT, Landscape, Path
from training.report.race import LEARNED, Race, Trace
from training.report.strips import Strips
from training.report.style import DIRECT, INK, METHODS, OPTIMUM, PALE, SEQUENCE, WIDTH, dress, figure, shades

CELL = 0.72
"""Inches of one image in the reconstruction strips."""

DEPTHS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Contours of the landscape: nats below the highest grid point."""


def elbo_by_steps(data: Race) -> Figure:
    """Learned refiner and optimisers by step (left) and by time (right). The axis begins where curves can be told apart."""
    made = figure(height=4.6)
    by_step, by_time = made.subplots(1, 2, sharey=True)
    for name, trace in data.traces.items():
        by_step.plot(data.steps, trace.elbo, **_line(name, trace))
        by_time.plot([trace.init_ms + k * trace.step_ms for k in data.steps], trace.elbo, **_line(name, trace))
    learned = data.traces[LEARNED]
    if data.trained_steps in data.steps:
        at = data.steps.index(data.trained_steps)
        spot = {"marker": "o", "markersize": 8, "markerfacecolor": "white", "markeredgewidth": 2, "zorder": 6, "linestyle": "none"}
        colour = METHODS[LEARNED]["color"]
        label = f"its trained K = {data.trained_steps}"
        by_step.plot([data.steps[at]], [learned.elbo[at]], color=colour, label=label, **spot)
        by_time.plot([learned.init_ms + data.trained_steps * learned.step_ms], [learned.elbo[at]], color=colour, **spot)
    for axes in (by_step, by_time):
        if data.direct is not None:
            axes.axhline(data.direct, label="direct encoder (own decoder)", **DIRECT)
        if data.optimum is not None:
            axes.axhline(data.optimum, label="optimum of each row", **OPTIMUM)
    by_step.set_ylim(*_elbo_limits(data))
    by_step.set_xscale("symlog", linthresh=1, linscale=0.35)
    by_step.set_xlim(0, data.steps[-1] * 1.08)
    _whole_ticks(by_step, [k for k in (0, 1, 3, 10, 30, 100, 300, 1000) if k <= data.steps[-1]])
    dress(by_step, x="refinement steps", y="ELBO, nats per image", title="by step")
    by_time.set_xscale("log")
    fastest = min(trace.step_ms for trace in data.traces.values())
    by_time.set_xlim(fastest * 0.6, max(t.init_ms + data.steps[-1] * t.step_ms for t in data.traces.values()) * 1.15)
    by_time.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    dress(by_time, x=f"time for {data.timing_rows} images, ms", y="", title="by wall-clock")
    made.legend(*_legend(by_step, data), loc="outside lower center", ncols=4, frameon=False, fontsize=9, columnspacing=1.6)
    return made


def _legend(axes: Axes, data: Race) -> tuple[list[Any], list[str]]:
    """The methods in the order of style.py, then whatever else there is."""
    handles, labels = axes.get_legend_handles_labels()
    names = list(data.traces)
    places = [names.index(name) for name in METHODS if name in data.traces] + list(range(len(names), len(handles)))
    return [handles[i] for i in places], [labels[i] for i in places]


def _line(name: str, trace: Trace) -> dict[str, object]:
    style = dict(METHODS[name])
    if trace.rate is not None:
        style["label"] = f"{style['label']}, rate {trace.rate:g}"
    return style


def _elbo_limits(data: Race) -> tuple[float, float]:
    """From a little under the worst final ELBO to a little over the best: the prior, hundreds of nats below, is left out.

    A method that never came within 60 nats of the best does not stretch the axis.
    """
    flat = [value for trace in data.traces.values() for value in trace.elbo] + [v for v in (data.direct, data.optimum) if v is not None]
    best = max(value for value in flat if math.isfinite(value))
    ends = [trace.elbo[-1] for trace in data.traces.values()] + ([] if data.direct is None else [data.direct])
    last = [value for value in ends if math.isfinite(value)]
    spread = min(60.0, max(12.0, 1.6 * (best - min(last, default=best))))
    return best - spread, best + 0.06 * spread


def _whole_ticks(axes: Axes, ticks: Sequence[int]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def reconstruction_strips(data: Strips) -> Figure:
    """Rows are digits, columns the number of steps, the last column is x."""
    height, width = data.shape
    rows, columns = len(data.x), len(data.steps) + 1
    cell = min(CELL, WIDTH / columns)
    made = figure(cell * columns, cell * rows * height / width + 0.8)
    made.set_layout_engine("constrained", w_pad=0.012, h_pad=0.012, wspace=0, hspace=0)
    grid = made.subplots(rows, columns, squeeze=False)
    elbo = np.asarray(data.elbo).mean(0)
    for column in range(columns):
        is_x = column == columns - 1
        head = "x" if is_x else "prior" if data.steps[column] == 0 else f"{data.steps[column]} step{'s' if data.steps[column] > 1 else ''}"
        grid[0, column].set_title(head, fontsize=9.5, color=INK, fontweight="bold" if is_x else "normal")
        if not is_x:
            grid[-1, column].set_xlabel(f"{elbo[column]:.1f}".replace("-", "−"), fontsize=9, color=INK)
        for row in range(rows):
            axes = grid[row, column]
            picture = data.x[row] if is_x else data.means[row, column]
            axes.imshow(picture.reshape(height, width), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color(INK if is_x else "#cccccc")
    made.supxlabel(f"mean ELBO of these {rows} images, nats", fontsize=9, color=INK)
    return made


def landscape_paths(data: Landscape) -> Figure:
    """Contours of log p(x, z), its highest grid point, and the two paths of μ; the digit in the corner."""
    made = figure(width=7.0, height=6.1)
    axes = made.add_subplot()
    below = data.log_joint.max() - data.log_joint
    deepest = next((depth for depth in DEPTHS if depth >= below.max()), float(below.max()))
    levels = [depth for depth in DEPTHS if depth < deepest] + [deepest]
    shaded = axes.contourf(data.axis, data.axis, below, levels=levels, cmap=f"{SEQUENCE}_r", norm=BoundaryNorm(levels, 256), alpha=0.75)
    axes.contour(data.axis, data.axis, below, levels=levels, colors="white", linewidths=0.5, alpha=0.8)
    bar = made.colorbar(shaded, ax=axes, pad=0.02, ticks=levels)
    bar.ax.set_yticklabels([f"−{level:.0f}" if level else "0" for level in levels], fontsize=9)
    bar.ax.invert_yaxis()
    bar.outline.set_visible(False)
    peak = f"{data.log_joint.max():.1f}".replace("-", "−")
    bar.set_label(f"log p(x, z) below its maximum of {peak} nats", color=INK)
    _draw_path(axes, data.ascent, color="#0072B2", label=f"gradient ascent, {len(data.ascent.mu) - 1} steps at rate {data.ascent.rate:g}")
    _draw_path(axes, data.learned, color="#D55E00", label=f"learned refiner, {len(data.learned.mu) - 1} steps")
    _mark(axes, data.learned.mu[0], marker="s", markersize=8, color="white", zorder=7, label="start: the prior's mean")
    _mark(axes, data.peak, marker="*", markersize=18, color="white", zorder=3, label="highest grid point")  # under the paths that end on it
    axes.set_aspect("equal")
    axes.set_xlim(-LIMIT, LIMIT)
    axes.set_ylim(-LIMIT, LIMIT)
    dress(axes, x="z₁", y="z₂")
    axes.grid(False)
    made.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelspacing=0.8)
    inset = axes.inset_axes((0.83, 0.83, 0.16, 0.16))
    inset.imshow(data.x.reshape(data.shape), cmap="gray_r", interpolation="nearest")
    inset.set_xticks([])
    inset.set_yticks([])
    inset.set_xlabel("x", fontsize=9, labelpad=1)
    return made


def _mark(axes: Axes, point: Sequence[float], **look: Any) -> None:
    axes.plot([point[0]], [point[1]], markeredgecolor=INK, linestyle="none", **look)


def _draw_path(axes: Axes, path: Path, *, color: str, label: str) -> None:
    x, y = path.mu[:, 0], path.mu[:, 1]
    axes.plot(x, y, color="white", linewidth=3.6, zorder=4, solid_joinstyle="round")  # a rim, so the path shows on every shade
    axes.plot(
        x, y, color=color, linewidth=1.8, marker="o", markersize=4.2, markeredgecolor="white", markeredgewidth=0.6, label=label, zorder=5
    )


def gradient_by_epoch(data: History) -> Figure:
    """Mean |∇μ L| after each number of steps, against epoch, both logarithmic."""
    made = figure(height=4.4)
    axes = made.add_subplot()
    count = len(data.grad_mu[-1])
    ends = _labelled(data.grad_mu[-1])
    for k, colour in enumerate(shades(count)):
        values = [entry[k] for entry in data.grad_mu]
        axes.plot(data.epochs, values, color=colour, linewidth=1.8, marker="o" if len(values) < 2 else None)
        if k in ends:
            name = "at the prior" if k == 0 else f"after {k} step{'s' if k > 1 else ''}"
            axes.annotate(name, (data.epochs[-1], values[-1]), (6, 0), textcoords="offset points", va="center", fontsize=9, color=INK)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    dress(axes, x="epoch", y="mean |∂L/∂μ|, nats per unit of μ")
    axes.margins(x=0.02)
    _phases(axes, data)
    return made


def _phases(axes: Axes, data: History) -> None:
    """A dotted line where each later phase begins."""
    for _, first in data.phases[1:]:
        axes.axvline(first - 0.5, color=PALE, linewidth=0.9, linestyle=":", zorder=0)


def _labelled(values: Sequence[float], apart: float = 1.13) -> set[int]:
    """Which curve ends get a label: first, last, and those that differ by the factor `apart` from the last label and the last curve.

    On the logarithmic axis closer ones would overlap.
    """
    last = len(values) - 1
    chosen = [0]
    for k in range(1, last):
        if all(max(values[k], values[j]) > apart * min(values[k], values[j]) for j in (chosen[-1], last)):
            chosen.append(k)
    return {*chosen, last}


def elbo_by_epoch(data: History, direct: History | None = None) -> Figure:
    """Validation ELBO after 0, 1 and K steps; the prior's, hundreds of nats away, in a panel of its own."""
    made = figure(height=4.8)
    steps = sorted({0, 1, data.steps})
    upper, lower = made.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    styles = {1: {"color": "#0072B2", "linewidth": 1.8}, data.steps: METHODS["learned"]}
    trained = " (trained K)" if len(data.phases) == 1 else ""
    floor: list[float] = []
    for k in steps[1:]:
        values = [entry[k] for entry in data.valid_elbo]
        look = styles[k] | {"label": f"after {k} step{'s' if k > 1 else ''}" + (trained if k == data.steps else "")}
        upper.plot(data.epochs, values, marker="o" if len(values) < 2 else None, **look)
        floor += values
    if direct is not None:
        values = [entry[0] for entry in direct.valid_elbo]
        upper.plot(direct.epochs, values, label="direct encoder (own decoder)", **DIRECT)
        floor += values
    upper.set_ylim(*_zoomed(floor))
    dress(upper, x="", y="ELBO, nats per image", title="refined")
    upper.legend(frameon=False, fontsize=9, loc="lower right")
    start = [entry[0] for entry in data.valid_elbo]
    lower.plot(data.epochs, start, color=PALE, linewidth=1.8, marker="o" if len(start) < 2 else None)
    lower.yaxis.set_major_locator(MaxNLocator(3))
    dress(lower, x="epoch", y="nats", title="before the first step: λ at the prior")
    _phases(upper, data)
    _phases(lower, data)
    made.align_ylabels()
    return made


def _zoomed(values: Sequence[float]) -> tuple[float, float]:
    """Limits that show the late, slow gains: the lowest tenth (the first epochs) may leave the axis."""
    low, high = float(np.quantile(values, 0.1)), max(values)
    margin = max(0.5, 0.08 * (high - low))
    return low - margin, high + margin
