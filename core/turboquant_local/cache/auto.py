"""The choice behind `preset="auto"`: settings that are safe for one model, with the reasons in plain sentences."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from turboquant_local.config import AUTO, TurboQuantConfig

logger = logging.getLogger(__name__)

COMPRESSIBLE: Final = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
"""transformers' layers of full attention, alone or beside a recurrent state."""

_BIASED_TYPES: Final = ("qwen2", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "phi", "gpt2", "bloom")
"""Beginnings of model types whose keys have a bias that no field of the config names."""

_BIAS_FIELDS: Final = ("attention_bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias", "use_bias", "enable_bias", "bias")
_SMALL_HEAD, _SMALL_WIDTH, _LARGE_GROUP = 64, 2048, 8


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `preset="auto"` comes to.

    Attributes:
        kv_cache: The settings, of a preset in `PRESETS`.
        explanation: Why, in plain sentences; "" if the settings named a preset themselves.
    """

    kv_cache: TurboQuantConfig
    explanation: str = ""


def choose(kv_cache: TurboQuantConfig, model_config: PreTrainedConfig) -> Choice:
    """Fill in "auto" for a model; other settings are returned as they are.

    The choice is `balanced`; `turboquant_k8v4` where keys have a bias, since what of it turns with the position
    survives centering (figures: examples/hard-keys-model, `measure.py --move`); `uncompressed` where no layer can be
    compressed. Fields that were given beside "auto" stay as given. The reasons are logged, each text once a process.

    Args:
        kv_cache: The settings.
        model_config: The model's config.
    """
    if kv_cache.preset != AUTO:
        return Choice(kv_cache)
    config = model_config.get_text_config(decoder=True)
    obstacle = _obstacle(config)
    if obstacle is not None:
        preset, reasons = "uncompressed", [obstacle]
    else:
        preset = "turboquant_k8v4" if has_key_bias(config) else "balanced"
        reasons = [*_layers_in_words(config), *_bits_in_words(config)]
    given = [f"{name}={value!r}" for name, value in kv_cache.to_dict().items() if name != "preset"]
    if given:
        reasons.append(f"As given: {', '.join(given)}.")
    explanation = f"{config.model_type}: preset {preset!r} is chosen. " + " ".join(reasons)
    _log_once(explanation)
    return Choice(dataclasses.replace(kv_cache, preset=preset), explanation)


def kv_shape(config: PreTrainedConfig) -> tuple[int, int] | None:
    """`(num_kv_heads, head_dim)` that every layer of a model shares, or None."""
    shapes = {_layer_shape(layer) for layer in getattr(config, "per_layer_config", None) or [config]}
    return shapes.pop() if len(shapes) == 1 else None


def _layer_shape(config: PreTrainedConfig) -> tuple[int, int] | None:
    q_heads = getattr(config, "num_attention_heads", None)
    # Falcon's older models say it in two other fields.
    one = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    heads = getattr(config, "num_key_value_heads", None) or (1 if one else q_heads)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and q_heads:
        head_dim = config.hidden_size // q_heads
    return (heads, head_dim) if isinstance(heads, int) and isinstance(head_dim, int) else None


def is_mla(config: PreTrainedConfig) -> bool:
    """Whether keys and values come from a latent that is smaller than they are."""
    return getattr(config, "kv_lora_rank", None) is not None


def has_key_bias(config: PreTrainedConfig) -> bool:
    """Whether the projection to keys has a bias, as far as the config and the model's type tell."""
    if any(config.model_type == name or config.model_type.startswith(f"{name}_text") for name in _BIASED_TYPES):
        return True
    return any(getattr(config, name, None) is True for name in _BIAS_FIELDS)


def _layers(config: PreTrainedConfig) -> list[Any]:
    return list(DynamicCache(config=config).layers)


def _obstacle(config: PreTrainedConfig) -> str | None:
    """Why no layer can be compressed; None if some can."""
    if is_mla(config):
        return "Its attention is MLA: keys and values come from a latent that is smaller still."
    if not any(type(layer) in COMPRESSIBLE for layer in _layers(config)):
        return "No layer has full attention: sliding windows and recurrent states do not grow with the context."
    shape = kv_shape(config)
    if shape is not None and shape[1] % 8:
        return f"Head size {shape[1]} is no multiple of 8, so codes do not fill whole bytes."
    return None


def _layers_in_words(config: PreTrainedConfig) -> Iterator[str]:
    layers = _layers(config)
    full = [layer for layer in layers if type(layer) in COMPRESSIBLE]
    if len(full) < len(layers):
        recurrent = sum(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers if layer not in full)
        others = [(recurrent, "recurrent"), (len(layers) - len(full) - recurrent, "sliding-window")]
        rest = " and ".join(f"{count} {kind}" for count, kind in others if count)
        yield f"{len(full)} of {len(layers)} layers have full attention and are compressed; {rest} ones stay as is."


def _bits_in_words(config: PreTrainedConfig) -> Iterator[str]:
    """Why these bits and no fewer."""
    against = list(_against_fewer_bits(config))
    yield from against
    if has_key_bias(config):
        yield "Its keys have a bias. Centering takes it off but for what turns with the position, so keys have 8 bits."
    elif against:
        yield "So 4 bits, and no fewer."
    else:
        yield "4 bits are the safe choice. Nothing in its shape speaks against preset 'compact' (3 bits): test it."


def _against_fewer_bits(config: PreTrainedConfig) -> Iterator[str]:
    shape = kv_shape(config)
    if shape is None:
        yield "Its layers differ in heads or head size."
        return
    kv_heads, head_dim = shape
    if head_dim <= _SMALL_HEAD:
        yield f"A head size of {head_dim} leaves few coordinates over which errors average out."
    if config.hidden_size < _SMALL_WIDTH:
        yield f"A hidden size of {config.hidden_size} marks a small model, and small models feel errors more."
    group = (getattr(config, "num_attention_heads", None) or kv_heads) // kv_heads
    if group >= _LARGE_GROUP:
        yield f"{group} query heads read each key head, so an error in a key is felt {group} times."


@cache
def _log_once(text: str) -> None:
    logger.info(text)
