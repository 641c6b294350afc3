"""Bytes: what a cache keeps alive, part by part, and what it will keep alive at a given length."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from turboquant_local.cache.layer import CompressedLayer
from turboquant_local.cache.storage import make_codec
from turboquant_local.codec.quantizer import Quantizer
from turboquant_local.config import TurboQuantConfig
from turboquant_local.errors import ConfigError
from turboquant_local.kernels.layout import vector_bytes

_ATTENTION_STATE = ("_k", "_v", "_k_codec", "_v_codec", "_constants", "_reserve", "_slot")
"""What a compressed layer holds for attention; a hybrid layer holds more."""


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that a cache keeps alive, by part; the parts add up to `total`.

    Attributes:
        codes: Packed codes.
        scales: The 8- or 16-bit scale of every packed vector.
        statistics: What is known of each head: mean key, channel weights, unit of scales.
        sinks: First tokens, in the model's dtype.
        recent: Recent window, in the model's dtype.
        bypassed: Layers left uncompressed.
        constants: Rotations and codebooks, once a cache, and how much of its buffers a static cache uses.
        total: All of it.
        uncompressed: What transformers' own cache would hold for the same tokens.
    """

    codes: int
    scales: int
    statistics: int
    sinks: int
    recent: int
    bypassed: int
    constants: int
    total: int
    uncompressed: int

    @property
    def compression_ratio(self) -> float:
        """`uncompressed / total`; 1.0 for an empty cache."""
        return self.uncompressed / self.total if self.total else 1.0


def live_tensors(obj: object) -> Iterator[torch.Tensor]:
    """Every tensor that an object holds in its attributes, containers and dataclasses."""
    if isinstance(obj, torch.Tensor):
        yield obj
    elif isinstance(obj, Mapping):
        for value in obj.values():
            yield from live_tensors(value)
    elif isinstance(obj, list | tuple):
        for value in obj:
            yield from live_tensors(value)
    elif dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        for field in dataclasses.fields(obj):
            yield from live_tensors(getattr(obj, field.name))


def storage_bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind tensors; a view counts for the whole it keeps alive."""
    storages = {storage.data_ptr() or id(storage): storage for storage in (x.untyped_storage() for x in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def report(layers: list[Any]) -> MemoryReport:
    """Count a cache's layers."""
    parts: dict[str, list[torch.Tensor]] = {
        "codes": [], "scales": [], "statistics": [], "sinks": [], "recent": [], "bypassed": [], "constants": []
    }  # fmt: skip
    uncompressed = 0
    for layer in layers:
        if not isinstance(layer, CompressedLayer):
            tensors = list(live_tensors(vars(layer)))
            parts["bypassed"] += tensors
            uncompressed += storage_bytes(iter(tensors))
            continue
        state = {name: value for name, value in vars(layer).items() if name not in _ATTENTION_STATE}
        recurrent = list(live_tensors(state))
        parts["bypassed"] += recurrent
        uncompressed += storage_bytes(iter(recurrent))
        parts["constants"] += live_tensors([layer._constants, layer._slot])
        for view in (layer._k, layer._v):
            if view is not None:
                batch, heads, _, head_dim = view.shape
                uncompressed += batch * heads * layer.get_seq_length() * head_dim * view.recent.element_size()
        for view in (layer._k, layer._v, *(layer._reserve or ())):
            if view is None:
                continue
            parts["constants"] += live_tensors(view.lengths)
            parts["sinks"].append(view.sinks)
            parts["recent"].append(view.recent)
            for part in view.packed:
                parts["codes"].append(part.codes)
                parts["scales"] += [] if part.scales is None else [part.scales]
            parts["statistics"] += live_tensors(view.statistics)
    counted = {name: storage_bytes(iter(tensors)) for name, tensors in parts.items()}
    return MemoryReport(**counted, total=sum(counted.values()), uncompressed=uncompressed)


def predict_bytes(
    model_config: PreTrainedConfig,
    kv_cache: TurboQuantConfig | Mapping[str, Any] | str | None = None,
    tokens: int = 0,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """What `TurboQuantCache.vram_bytes()` will be, to the byte, once the cache holds so many tokens.

    An engine's cache on a GPU holds more while a CUDA graph is kept: buffers with room to spare.

    Args:
        model_config: The model's config.
        kv_cache: The cache's settings.
        tokens: Tokens in the cache, the last of them added by a decode step.
        batch_size: Sequences.
        dtype: The model's dtype.

    Raises:
        ConfigError: Counts that are none, or a model that has recurrent states or layers whose size does not follow
            from the config.
    """
    from turboquant_local.cache.cache import TurboQuantCache  # the cache reports through this file

    for name, count, least in (("tokens", tokens, 0), ("batch_size", batch_size, 1)):
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise ConfigError(f"{name}={count!r}: expected an integer of at least {least}")
    cache = TurboQuantCache(model_config, kv_cache, set_attention=False)
    config, shape = cache.kv_cache, cache.kv_shape
    if shape is None:
        raise ConfigError("model_config: it does not say num_key_value_heads and head_dim, so nothing can be predicted")
    heads, head_dim = shape
    if not tokens:
        return storage_bytes(live_tensors([vars(layer) for layer in cache.layers]))
    total = 0
    quantizers: list[Quantizer] = []
    plain = head_dim * dtype.itemsize
    far = config.far_length(tokens)
    near = config.packed_length(tokens) - far
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin) or not isinstance(layer, DynamicLayer):
            raise ConfigError(
                f"layer {index} ({type(layer).__name__}): its size does not follow from the config; "
                "run the model and read vram_bytes()"
            )
        if isinstance(layer, CompressedLayer):
            own = layer.kv_cache
            codecs = [make_codec(own, head_dim, own.k_bits, True), make_codec(own, head_dim, own.v_bits, False)]
            for codec in codecs:
                vectors = far * vector_bytes(codec.far, dtype) + near * vector_bytes(codec.near, dtype)
                vectors += (tokens - far - near) * plain
                if far + near:
                    sample = torch.zeros(1, 1, 1, head_dim, dtype=dtype)
                    vectors += storage_bytes(live_tensors(codec.statistics(sample)))
                total += batch_size * heads * vectors
            quantizers += [codec.far for codec in codecs if far] + [codec.near for codec in codecs if near]
        elif isinstance(layer, DynamicSlidingWindowLayer):
            kept = min(tokens, layer.sliding_window)
            total += 2 * batch_size * heads * kept * plain + layer._sliding_window_tensor.nbytes
        elif "MLA" in cache.bypassed.get(str(index), ""):
            raise ConfigError(
                f"layer {index}: MLA heads do not follow from the config; run the model and read vram_bytes()"
            )
        else:
            total += 2 * batch_size * heads * tokens * plain
    constants = [quantizer.constants(torch.device("cpu")) for quantizer in quantizers]
    return total + storage_bytes(live_tensors(constants))
