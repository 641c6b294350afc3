"""The codecs that can be measured, by name."""

from __future__ import annotations

from typing import Any

from turboquant_local.config import PRESETS, TurboQuantConfig
from turboquant_local.errors import EvaluationError
from turboquant_local.evaluation.codecs.base import KVCodec
from turboquant_local.evaluation.codecs.turboquant import TurboQuantCodec


def find_codec(text: str) -> KVCodec:
    """The codec that a text names: a preset, with fields that override it if there are any.

    Args:
        text: Such as "balanced" or "balanced:k_bits=3,v_bits=2".

    Raises:
        EvaluationError: No such codec, or a field that is not written name=value.
        ConfigError: An unknown field, or a value outside its range.
    """
    name, _, fields = text.partition(":")
    if name not in PRESETS:
        raise EvaluationError(f"codec={name!r}: expected one of {', '.join(PRESETS)}")
    return TurboQuantCodec(text, TurboQuantConfig.parse(name, **_fields(text, fields)))


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
