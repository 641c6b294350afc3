"""Plots of what was measured; they need matplotlib, which is imported on first use."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turboquant_local.errors import EvaluationError
from turboquant_local.evaluation.comparison import TOKENS, Comparison, frontier
from turboquant_local.evaluation.layers import LayerFidelity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEAST = 1e-9
"""Losses are drawn on a logarithmic axis, which has no 0."""


def check_plot(path: Path) -> None:
    """Refuse a plot that cannot be drawn, before anything is measured.

    Raises:
        EvaluationError: matplotlib is not installed, or it cannot write such a file.
    """
    kinds = _figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.lstrip(".") not in kinds:
        raise EvaluationError(f"plot={str(path)!r}: expected a file name that ends in one of {', '.join(kinds)}")


def plot_frontier(rows: Sequence[Comparison], path: Path, *, title: str, highlight: str | None = None) -> None:
    """Loss against bytes, both logarithmic. Codecs named alike but for the bits are one series.

    Args:
        rows: The codecs; those without figures are left out.
        path: Where the plot goes.
        title: Its title.
        highlight: Name of a codec to be marked.
    """
    figure = _figure(8.5, 5.5)
    _draw_frontier(figure.add_subplot(), rows, highlight)
    figure.suptitle(title)
    _save(figure, path)


def plot_verification(
    layers: Sequence[LayerFidelity], rows: Sequence[Comparison], path: Path, *, title: str, highlight: str
) -> None:
    """Error by layer beside loss against bytes.

    Args:
        layers: The layers.
        rows: The verified settings and others to compare with.
        path: Where the plot goes.
        title: Its title.
        highlight: Name of the verified settings among the rows.
    """
    figure = _figure(13, 5)
    left, right = figure.subplots(1, 2)
    measured = [layer for layer in layers if layer.output_error is not None]
    series: Mapping[str, list[float]] = {
        "attention output, relative error": [layer.output_error or 0 for layer in measured],
        "keys, 1 - cosine": [1 - (layer.key_cosine or 1) for layer in measured],
        "values, 1 - cosine": [1 - (layer.value_cosine or 1) for layer in measured],
    }
    for (label, values), marker in zip(series.items(), "os^", strict=True):
        left.plot(
            [layer.layer for layer in measured], [max(value, _LEAST) for value in values], marker, ls="-", label=label
        )
    left.set(xlabel="layer", ylabel="error", yscale="log", title="Error by layer")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(alpha=0.3, which="both")
    left.legend()
    _draw_frontier(right, rows, highlight)
    right.set_title("Loss against bytes")
    figure.suptitle(title)
    _save(figure, path)


def _draw_frontier(axes: Axes, rows: Sequence[Comparison], highlight: str | None) -> None:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.fidelity is not None:
            family = re.sub(r"-[\d.]+$", "", row.codec)  # kivi-2, kivi-3 and kivi-4 are one series
            series.setdefault(family, []).append((row.size.stored_bytes / 2**20, max(row.fidelity.kl_mean, _LEAST)))
    best = frontier(chain.from_iterable(series.values()))
    axes.plot(*zip(*best, strict=True), color="0.75", lw=5, alpha=0.6, zorder=1, label="least loss for its bytes")
    markers = cycle("sD^vP<>p")
    for family, points in series.items():
        if len(points) > 1:
            axes.plot(*zip(*sorted(points), strict=True), marker=next(markers), ms=5, lw=1, ls=":", label=family)
            continue
        color, size = ("tab:red", 60) if family == highlight else ("black", 25)
        axes.scatter(*points[0], s=size, color=color, zorder=3)
        axes.annotate(
            family, points[0], xytext=(-5, -11), textcoords="offset points", ha="right", fontsize=9, color=color
        )
    axes.set(
        xscale="log", yscale="log", xlabel=f"MiB of KV cache at {TOKENS} tokens", ylabel="mean KL divergence (nats)"
    )
    axes.margins(x=0.2, y=0.1)
    for formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        formatter(lambda value, _: f"{value:.3g}")
    axes.tick_params(axis="x", which="minor", labelsize=7)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError("plot: matplotlib is not installed; pip install 'turboquant-local[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
