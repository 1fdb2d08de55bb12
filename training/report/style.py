"""One look for all figures. Colours are those of Okabe & Ito (2008), told apart with every common kind of colour blindness;
each method also has its own dashes or marker, so the figures survive a grey printer.

Figures are matplotlib's objects, without pyplot: nothing global is touched and nothing opens a window.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 150
WIDTH = 8.0
"""Inches: 1,200 pixels, twice what a README column shows, so text of 10 points stays readable there."""

INK, PALE = "#222222", "#8a8a8a"
SEQUENCE = "viridis"

METHODS: dict[str, dict[str, Any]] = {
    "learned": {"label": "learned refiner", "color": "#D55E00", "linewidth": 2.6, "zorder": 5},
    "adam": {"label": "Adam", "color": "#0072B2", "linestyle": "-", "linewidth": 1.6},
    "rmsprop": {"label": "RMSProp", "color": "#009E73", "linestyle": (0, (6, 2)), "linewidth": 1.6},
    "momentum": {"label": "SGD + momentum", "color": "#CC79A7", "linestyle": (0, (4, 1.5, 1, 1.5)), "linewidth": 1.6},
    "sgd": {"label": "SGD", "color": "#56B4E9", "linestyle": (0, (1.5, 1.5)), "linewidth": 1.8},
}
DIRECT: dict[str, Any] = {"color": INK, "linestyle": (0, (8, 3)), "linewidth": 1.2}
OPTIMUM: dict[str, Any] = {"color": INK, "linestyle": ":", "linewidth": 1.4}


def figure(width: float = WIDTH, height: float = 4.2) -> Figure:
    """An empty figure, sizes in inches, on the Agg canvas."""
    made = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    return made


def dress(axes: Axes, *, x: str, y: str, title: str = "") -> None:
    """Labels, a light grid behind the data, no box."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    if title:
        axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors="#444444", labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9a9a9a")


def shades(count: int) -> list[Any]:
    """`count` colours in order, dark to light, the palest left out."""
    map_ = matplotlib.colormaps[SEQUENCE]
    return [map_(0.9 * i / max(1, count - 1)) for i in range(count)]


def save(made: Figure, file: Path) -> Path:
    """Writes a PNG beside its place and moves it there, so an interrupted run leaves no half picture."""
    partial = file.with_suffix(".partial")
    made.savefig(partial, format="png", dpi=DPI, metadata={"Software": None})
    os.replace(partial, file)
    return file
