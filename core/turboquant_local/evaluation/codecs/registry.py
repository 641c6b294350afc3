"""The codecs that can be measured, by name; shared by every command and benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from turboquant_local.config import PRESETS, TurboQuantConfig
from turboquant_local.errors import EvaluationError, did_you_mean
from turboquant_local.evaluation.codecs.base import KVCodec
from turboquant_local.evaluation.codecs.fake_quantized import (
    RESIDUAL_LENGTH,
    SINK_LENGTH,
    FakeQuantizedCodec,
    FakeQuantizer,
)
from turboquant_local.evaluation.codecs.fp8 import FP8
from turboquant_local.evaluation.codecs.hadamard_int import HadamardInt
from turboquant_local.evaluation.codecs.identity import Identity
from turboquant_local.evaluation.codecs.kivi import KIVIKeys, KIVIValues
from turboquant_local.evaluation.codecs.paper import TurboQuantMixed, TurboQuantMSE, TurboQuantProd
from turboquant_local.evaluation.codecs.quantized_cache import TransformersQuantizedCache
from turboquant_local.evaluation.codecs.tile_scaling import TileScaling
from turboquant_local.evaluation.codecs.turboquant import TurboQuantCodec


def _both(name: str, make: Callable[[], FakeQuantizer], **fields: int) -> FakeQuantizedCodec:
    return FakeQuantizedCodec(name, make(), make(), **fields)


def _kivi(name: str, bits: int, group: int = 64, **fields: int) -> FakeQuantizedCodec:
    return FakeQuantizedCodec(name, KIVIKeys(bits, group), KIVIValues(bits, group), **fields)


def _prod(name: str, bits: int, **fields: int) -> FakeQuantizedCodec:
    """The paper's inner-product codec for keys; values need a vector, not inner products."""
    return FakeQuantizedCodec(name, TurboQuantProd(bits), TurboQuantMSE(bits), **fields)


def _plain(name: str, bits: int, **fields: Any) -> TurboQuantCodec:
    """The paper's Algorithm 1 behind the sinks and the window that every codec here has."""
    window = {"sink_length": SINK_LENGTH, "residual_length": RESIDUAL_LENGTH}
    return TurboQuantCodec(
        name, TurboQuantConfig(preset="paper", **{"k_bits": bits, "v_bits": bits, **window, **fields})
    )


def _preset(name: str, preset: str, **fields: Any) -> TurboQuantCodec:
    return TurboQuantCodec(name, TurboQuantConfig.parse(preset, **fields))


CODECS: Final[Mapping[str, Callable[..., KVCodec]]] = {
    # Ours: the presets as they are; any field can be overridden.
    **{preset: partial(_preset, preset=preset) for preset in PRESETS},
    **{f"ours-{bits}": partial(_preset, preset="balanced", k_bits=bits, v_bits=bits) for bits in (4, 3, 2)},
    # Others, behind the same sinks and the same window.
    "fake-identity": lambda name, **fields: _both(name, Identity, **fields),
    "fp8": lambda name, **fields: _both(name, FP8, **fields),
    **{
        f"{family}-{bits}": partial(make, bits=bits)
        for bits in (4, 3, 2)
        for family, make in (
            ("plain-turboquant", _plain),
            ("turboquant-prod", _prod),
            ("hadamard-int", lambda name, bits, **fields: _both(name, partial(HadamardInt, bits), **fields)),
            ("kivi", _kivi),
            ("tile-scaling", lambda name, bits, **fields: _both(name, partial(TileScaling, bits), **fields)),
        )
    },
    "turboquant-mixed-3.5": lambda name, **fields: _both(name, partial(TurboQuantMixed, 3), **fields),
    "turboquant-mixed-2.5": lambda name, **fields: _both(name, partial(TurboQuantMixed, 2), **fields),
    # transformers' own, with its own window and without sinks; they need a package.
    "quanto-4": partial(TransformersQuantizedCache, backend="quanto", bits=4),
    "quanto-2": partial(TransformersQuantizedCache, backend="quanto", bits=2),
    "hqq-4": partial(TransformersQuantizedCache, backend="hqq", bits=4),
}
"""Makers of codecs: each takes the name to show and the fields to override."""

_MANY: Final = 1 << 20
_RANGES: Final = {
    "bits": range(1, 9),
    "group": range(1, _MANY),
    "sink_length": range(_MANY),
    "fewest_recent": range(_MANY),
}
"""What the fields of the other codecs may be; those of presets are checked by their config."""


def find_codec(text: str) -> KVCodec:
    """The codec that a text names, with fields that override its own if there are any.

    Args:
        text: Such as "balanced", "balanced:k_bits=3,v_bits=2" or "kivi-2:group=32".

    Raises:
        EvaluationError: No such codec or field, a field that is not written name=value, or a value outside its range.
        ConfigError: A field of `TurboQuantConfig` with a value outside its range.
    """
    name, _, fields = text.partition(":")
    if name not in CODECS:
        raise EvaluationError(f"codec={name!r}: expected one of {', '.join(CODECS)}{did_you_mean(name, CODECS)}")
    given = _fields(text, fields)
    for field in given.keys() & _RANGES.keys():
        value, allowed = given[field], _RANGES[field]
        if isinstance(value, float) or value not in allowed:
            raise EvaluationError(
                f"codec={text!r}: {field}={value!r}: expected an integer from {allowed[0]} to {allowed[-1]}"
            )
    try:
        return CODECS[name](text, **given)
    except TypeError as error:  # from the maker's signature
        raise EvaluationError(f"codec={text!r}: {name} has no such field ({error})") from error


def _fields(text: str, fields: str) -> dict[str, Any]:
    pairs = [pair.partition("=") for pair in fields.split(",")] if fields else []
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise EvaluationError(f"codec={text!r}: expected fields as name=value, as in 'balanced:k_bits=3,v_bits=2'")
    return {name.strip(): _value(value.strip()) for name, _, value in pairs}


def _value(text: str) -> int | float | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
