"""`turboquant-local verify`: is a model safe with these settings?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from turboquant_local.cache.auto import choose
from turboquant_local.cli import shared
from turboquant_local.config import TurboQuantConfig
from turboquant_local.evaluation.codecs.registry import find_codec
from turboquant_local.evaluation.codecs.turboquant import TurboQuantCodec
from turboquant_local.evaluation.comparison import Comparison, compare, size
from turboquant_local.evaluation.fidelity import CHUNK
from turboquant_local.evaluation.layers import LayerFidelity
from turboquant_local.evaluation.models import load_model
from turboquant_local.evaluation.plots import check_plot, plot_verification
from turboquant_local.evaluation.verification import Check, Thresholds, Verification
from turboquant_local.evaluation.verification import verify as measure

_NEIGHBOURS = ("turboquant_k8v4", "balanced", "compact", "extreme")
"""Presets that a plot shows beside the verified settings."""


def verify(
    model: shared.ModelOption,
    preset: Annotated[
        str, typer.Option(help="Name of the preset; auto chooses one that suits the model.")
    ] = "balanced",
    k_bits: Annotated[int | None, typer.Option(help="Bits of keys, instead of the preset's.")] = None,
    v_bits: Annotated[int | None, typer.Option(help="Bits of values, instead of the preset's.")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Least cosine of keys and values in every layer. [default: by bits]"),
    ] = None,
    max_kl: Annotated[float, typer.Option(min=0, help="Greatest mean KL divergence, in nats.")] = Thresholds.kl,
    min_top1: Annotated[float, typer.Option(min=0, max=1, help="Least top-1 agreement.")] = Thresholds.top1,
    text: shared.TextOption = None,
    windows: shared.WindowsOption = 4,
    window: shared.WindowOption = None,
    context: shared.ContextOption = None,
    stride: shared.StrideOption = None,
    chunk: shared.ChunkOption = CHUNK,
    device: shared.DeviceOption = None,
    dtype: shared.DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="File for a plot: error by layer, loss against bytes.")
    ] = None,
) -> None:
    """Check a model with a compressed cache; exit code 1 if it misses a threshold, 2 if it cannot be measured.

    The model reads windows of text with the compressed cache in use and is compared with itself uncompressed:
    prediction by prediction, and layer by layer.
    """
    console = Console(stderr=True)
    with shared.told_errors():
        bits = {name: value for name, value in (("k_bits", k_bits), ("v_bits", v_bits)) if value is not None}
        kv_cache = TurboQuantConfig.parse(preset, **bits)
        if plot is not None:
            check_plot(plot)
        with console.status("loading the model"):
            loaded = load_model(model, device=device, dtype=dtype)
        choice = choose(kv_cache, loaded.model.config)
        kv_cache = choice.kv_cache
        name = ", ".join([preset, *(f"{field}={value}" for field, value in bits.items())])
        verified = TurboQuantCodec(name, kv_cache)
        if plot is not None:
            held = size(verified, loaded.model.config)  # cannot be told of every model
        ids, start = shared.windows_of(loaded, text, window, windows, context, stride)
        with shared.progress(console, 2 * len(ids) + 1) as advance:
            found = measure(
                loaded.model, ids, kv_cache, Thresholds(threshold, max_kl, min_top1),
                context=start, chunk=chunk, on_progress=advance,
            )  # fmt: skip
        conditions = shared.conditions(model, loaded)
        if plot is not None:
            codecs = [find_codec(name) for name in _NEIGHBOURS if name != preset or bits]
            with shared.progress(console, len(codecs) * len(ids)) as advance:
                rows = compare(loaded.model, ids, codecs, context=start, chunk=chunk, on_progress=advance)
            rows.append(Comparison(name, held, found.fidelity))
            plot_verification(found.layers, rows, plot, title=f"{model}: {name}", highlight=name)
    if as_json:
        typer.echo(json.dumps({**conditions, "windows": list(ids.shape), **found.to_dict()}, indent=2))
    else:
        output = shared.output()
        if choice.explanation:
            output.print(choice.explanation, soft_wrap=True)
        show(output, found, conditions)
    if not found.passed:
        raise typer.Exit(1)


def show(console: Console, found: Verification, conditions: dict[str, str]) -> None:
    """Print the tables and the verdict."""
    console.print(_table(found.layers))
    fidelity = found.fidelity
    interval = fidelity.perplexity_interval
    bounds = "" if interval is None else f", 95 % interval {interval[0]:+.2%} to {interval[1]:+.2%}"
    lines = [
        f"{fidelity.scored_tokens} tokens scored in {fidelity.windows} windows",
        f"perplexity       {fidelity.reference_perplexity:.4f} -> {fidelity.perplexity:.4f} "
        f"({fidelity.perplexity_change:+.2%}{bounds})",
        f"KL divergence    mean {fidelity.kl_mean:.2g}, median {fidelity.kl_median:.2g}, 99.9 % {fidelity.kl_tail:.2g} "
        f"(rounding alone: {found.floor.kl_mean:.1g})",
        f"top-1 agreement  {fidelity.top1_agreement:.2%}",
    ]
    if found.stored_bytes is not None and found.uncompressed_bytes is not None:
        stored, plain = found.stored_bytes, found.uncompressed_bytes
        lines.append(f"at {found.tokens} tokens   {stored:,} bytes instead of {plain:,} ({plain / stored:.2f}x)")
    lines.append(shared.told(conditions))
    console.print("\n".join(lines), soft_wrap=True)
    for check in found.checks:
        console.print(_verdict(check), soft_wrap=True)
    console.print("[green]passed[/]" if found.passed else "[red]FAILED[/]")


def _table(layers: list[LayerFidelity]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for name in ("layer", "key cosine", "value cosine", "output error", "bits", "bytes", "of"):
        table.add_column(name, justify="right")
    for layer in layers:
        if layer.bypassed is not None or layer.stored_bytes is None:
            table.add_row(str(layer.layer), *["-"] * 4, layer.bypassed or "not seen", "")
            continue
        table.add_row(
            str(layer.layer),
            _number(layer.key_cosine, ".4f"),
            _number(layer.value_cosine, ".4f"),
            _number(layer.output_error, ".2%"),
            _number(layer.bits_per_coordinate, ".3f"),
            f"{layer.stored_bytes:,}",
            f"{layer.uncompressed_bytes:,}",
        )
    return table


def _verdict(check: Check) -> str:
    relation = ("at most" if check.figure == "kl_mean" else "at least") + f" {check.threshold:.4g}"
    layer: Any = ""
    if check.layer is not None:
        worst = "worst" if "cosine" in check.figure else "greatest output error"
        layer = f" ({worst}: layer {check.layer})"
    word = "[green]ok    [/]" if check.passed else "[red]FAILED[/]"
    return f"{word} {check.figure} {check.value:.4g}, {relation}{layer}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
