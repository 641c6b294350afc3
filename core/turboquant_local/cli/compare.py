"""`turboquant-local compare`: many codecs on the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from turboquant_local.cli import shared
from turboquant_local.evaluation.codecs.registry import CODECS, find_codec
from turboquant_local.evaluation.comparison import TOKENS, Comparison, write_csv
from turboquant_local.evaluation.comparison import compare as measure
from turboquant_local.evaluation.fidelity import CHUNK
from turboquant_local.evaluation.models import load_model
from turboquant_local.evaluation.plots import check_plot, plot_frontier

_OTHERS = ("plain-turboquant", "hadamard-int", "kivi", "tile-scaling")
_PRESETS = ("turboquant_k8v4", "balanced", "compact", "extreme", "paper")
DEFAULT = (*_PRESETS, "fp8", *(f"{other}-{bits}" for bits in (4, 3, 2) for other in _OTHERS))
"""What is compared if no codec is named."""


def _list(asked: bool) -> None:
    if asked:
        typer.echo("\n".join(CODECS))
        raise typer.Exit


def compare(
    model: shared.ModelOption,
    codecs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CODEC",
            help="Names, with fields to override as in balanced:k_bits=3,v_bits=2. [default: presets and others]",
            show_default=False,
        ),
    ] = None,
    text: shared.TextOption = None,
    windows: shared.WindowsOption = 4,
    window: shared.WindowOption = None,
    context: shared.ContextOption = None,
    stride: shared.StrideOption = None,
    chunk: shared.ChunkOption = CHUNK,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows fed together.")] = 1,
    device: shared.DeviceOption = None,
    dtype: shared.DtypeOption = "auto",
    csv: Annotated[Path | None, typer.Option(dir_okay=False, help="File for the table as CSV.")] = None,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="File for a plot of loss against bytes.")] = None,
    known: Annotated[
        bool, typer.Option("--list", callback=_list, is_eager=True, help="Print the codecs that have a name.")
    ] = False,
) -> None:
    """Compare codecs on the same tokens: what they store, and what they lose.

    Presets of this package stand beside other codecs behind the same sinks and recent window. Others than the
    presets are computed, not stored: they show their loss, and their bytes by formula.
    """
    console = Console(stderr=True)
    with shared.told_errors():
        chosen = [find_codec(name) for name in dict.fromkeys(codecs or DEFAULT)]
        if plot is not None:
            check_plot(plot)
        with console.status("loading the model"):
            loaded = load_model(model, device=device, dtype=dtype)
        ids, start = shared.windows_of(loaded, text, window, windows, context, stride)
        steps = -(-len(ids) // batch_size) * len(chosen)
        with shared.progress(console, steps) as advance:
            rows = measure(
                loaded.model, ids, chosen, context=start, chunk=chunk, batch_size=batch_size, on_progress=advance
            )
        conditions = shared.conditions(model, loaded)
        if csv is not None:
            write_csv(csv, rows, conditions)
        if plot is not None:
            plot_frontier(rows, plot, title=f"{model}, {len(ids)} windows of {ids.shape[1]} tokens")
    output = shared.output()
    output.print(table(rows))
    for row in rows:
        if row.skipped is not None:
            output.print(f"{row.codec}: {row.skipped}", soft_wrap=True)
    output.print(shared.told(conditions), soft_wrap=True)


def table(rows: list[Comparison]) -> Table:
    """One line a codec, in the order of their bytes."""
    reference = next((row.fidelity.reference_perplexity for row in rows if row.fidelity is not None), None)
    view = Table(
        box=SIMPLE_HEAD,
        title="" if reference is None else f"uncompressed perplexity {reference:.4f}",
        caption=f"bits a coordinate of every further token; bytes at {TOKENS} tokens",
    )
    view.add_column("codec", no_wrap=True)
    for name in ("bits", "ratio", "KL mean", "median", "99.9 %", "top-1", "perplexity"):
        view.add_column(name, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: -row.size.stored_bytes):
        sizes = (f"{row.size.bits_per_coordinate:.3f}", f"{row.size.compression:.2f}x")
        if row.fidelity is None:
            view.add_row(row.codec, *sizes, *["-"] * 5)
            continue
        found = row.fidelity
        losses = (f"{loss:.2g}" for loss in (found.kl_mean, found.kl_median, found.kl_tail))
        view.add_row(row.codec, *sizes, *losses, f"{found.top1_agreement:.2%}", f"{found.perplexity_change:+.2%}")
    return view
