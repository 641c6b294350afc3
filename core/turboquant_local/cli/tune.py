"""`turboquant-local tune`: divide the bits of a preset among a model's layers."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from turboquant_local.cache.auto import choose
from turboquant_local.cli import shared
from turboquant_local.config import TurboQuantConfig
from turboquant_local.errors import ConfigError, EvaluationError
from turboquant_local.evaluation.codecs.turboquant import TurboQuantCodec
from turboquant_local.evaluation.comparison import TOKENS, size
from turboquant_local.evaluation.fidelity import CHUNK, Fidelity, measure_fidelity
from turboquant_local.evaluation.layer_bits import LayerShare, divide_bits, settings
from turboquant_local.evaluation.models import load_model


def tune(
    model: shared.ModelOption,
    preset: Annotated[str, typer.Option(help="Name of the preset whose bits are divided.")] = "balanced",
    text: shared.TextOption = None,
    windows: Annotated[
        int, typer.Option(min=2, help="Windows of text, at most; the first half divides, the other half checks.")
    ] = 4,
    window: shared.WindowOption = None,
    context: shared.ContextOption = None,
    stride: shared.StrideOption = None,
    chunk: shared.ChunkOption = CHUNK,
    device: shared.DeviceOption = None,
    dtype: shared.DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Divide a preset's bits among the layers of a model, by what each loses; prints the settings to use.

    Every layer's keys and values are compressed alone, so this takes two readings of the text a layer. What it brings
    is then measured on text that was not used.
    """
    console = Console(stderr=True)
    with shared.told_errors():
        kv_cache = TurboQuantConfig.parse(preset)
        with console.status("loading the model"):
            loaded = load_model(model, device=device, dtype=dtype)
        kv_cache = choose(kv_cache, loaded.model.config).kv_cache
        ids, start = shared.windows_of(loaded, text, window, windows, context, stride)
        if len(ids) < 2:
            raise EvaluationError("text: expected two windows or more, one of them to check on; give a longer text")
        half = len(ids) // 2
        layers = int(loaded.model.config.get_text_config().num_hidden_layers)
        with shared.progress(console, 2 * layers * half) as advance:
            shares = divide_bits(loaded.model, ids[:half], kv_cache, context=start, chunk=chunk, on_progress=advance)
        plain = TurboQuantCodec(preset, kv_cache)
        tuned = TurboQuantCodec("tuned", settings(kv_cache, shares))
        with shared.progress(console, 2 * (len(ids) - half)) as advance:
            before, after = measure_fidelity(
                loaded.model, ids[half:], [plain, tuned], context=start, chunk=chunk, on_progress=advance
            )
        conditions = shared.conditions(model, loaded)
    fields = {"preset": kv_cache.preset, "layer_bits": tuned.kv_cache.to_dict()["layer_bits"]}
    if as_json:
        losses = {name: found.kl_mean for name, found in (("kl_before", before), ("kl_after", after))}
        typer.echo(json.dumps({**conditions, "kv_cache": fields, **losses}, indent=2))
        return
    output = shared.output()
    output.print(_table(shares))
    output.print(f"checked on {before.scored_tokens} tokens that were not used to divide")
    for found, codec in ((before, plain), (after, tuned)):
        output.print(_line(found, codec, loaded.model.config), soft_wrap=True)
    output.print(shared.told(conditions), soft_wrap=True)
    output.print(f"kv_cache={json.dumps(fields)}", soft_wrap=True)


def _table(shares: list[LayerShare]) -> Table:
    table = Table(box=SIMPLE_HEAD, caption="KL: of 3 bits in this place alone")
    for name in ("layer", "KL of keys", "KL of values", "bits of keys", "of values"):
        table.add_column(name, justify="right")
    for share in shares:
        losses = (f"{share.keys_kl:.2g}", f"{share.values_kl:.2g}")
        table.add_row(str(share.layer), *losses, str(share.k_bits), str(share.v_bits))
    return table


def _line(found: Fidelity, codec: TurboQuantCodec, model_config: Any) -> str:
    try:
        ratio = f"{size(codec, model_config).compression:.2f}x at {TOKENS} tokens, "
    except ConfigError:  # recurrent layers, whose bytes the config does not tell
        ratio = ""
    return (
        f"{found.codec:10} {ratio}mean KL {found.kl_mean:.2g}, "
        f"median {found.kl_median:.2g}, 99.9 % {found.kl_tail:.2g}, top-1 {found.top1_agreement:.2%}"
    )
