"""Bits by layer: which layers of a model react to a coarse cache, and what the same bits bring if these get more.

A layer's share of the loss is measured with that layer's keys, or values, alone compressed. It grows with the squared
error of the codes, so the shares at other widths follow from the codebooks' errors, and dividing the bits is a small
knapsack problem. The idea, for layers of the KV cache: KVTuner (arXiv 2502.04420).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from turboquant_local.cache import TurboQuantCache
from turboquant_local.cache.auto import choose
from turboquant_local.cache.layer import CompressedLayer, PlainLayer
from turboquant_local.codec.codebook import lloyd_max
from turboquant_local.config import TurboQuantConfig
from turboquant_local.errors import EvaluationError
from turboquant_local.evaluation.codecs.turboquant import TurboQuantCodec
from turboquant_local.evaluation.fidelity import CHUNK, measure_fidelity
from turboquant_local.evaluation.windows import CONTEXT

WIDTHS = (2, 3, 4, 6)
"""Bits that a layer's keys or values may be given."""

_PROBE_BITS = 3


@dataclass(frozen=True)
class LayerShare:
    """What one layer loses, and what it is given.

    Attributes:
        layer: Its number.
        keys_kl: Mean KL divergence, in nats, with 3-bit keys in this layer and nothing else compressed.
        values_kl: The same for its values.
        k_bits: The bits it is given for keys.
        v_bits: For values.
    """

    layer: int
    keys_kl: float
    values_kl: float
    k_bits: int
    v_bits: int


@dataclass(frozen=True)
class _OneSide(TurboQuantCodec):
    """A cache that compresses keys or values of one layer."""

    layer: int = 0

    def cache(self, model_config: PreTrainedConfig) -> TurboQuantCache:
        cache = super().cache(model_config)
        for index, layer in enumerate(cache.layers):
            if type(layer) is CompressedLayer and index != self.layer:
                cache.layers[index] = PlainLayer()  # type: ignore[no-untyped-call]
        return cache


def divide_bits(
    model: Any,
    windows: torch.Tensor,
    kv_cache: TurboQuantConfig,
    *,
    context: int = CONTEXT,
    chunk: int = CHUNK,
    on_progress: Callable[[str], None] | None = None,
) -> list[LayerShare]:
    """Give layers bits by what they lose; together they get as many as `kv_cache` gives them.

    Args:
        model: A causal language model.
        windows: `[windows, length]` token ids; see `cut_windows`.
        kv_cache: The settings; their `k_bits` and `v_bits` say how many bits there are to divide.
        context: Tokens at the start of a window that are not scored.
        chunk: Fewest tokens fed at a time; see `decoding_chunks`.
        on_progress: Called twice a layer and window.

    Raises:
        EvaluationError: No layer is compressed, the bits are too few or too many, or the windows too short.
    """
    kv_cache = dataclasses.replace(choose(kv_cache, model.config).kv_cache, layer_bits=())
    layers = TurboQuantCache(model.config, kv_cache, set_attention=False).layers
    indices = [index for index, layer in enumerate(layers) if type(layer) is CompressedLayer]
    if not indices:
        raise EvaluationError(f"model={model.config.model_type!r}: no layer of it is compressed with these settings")
    total = len(indices) * (kv_cache.k_bits + kv_cache.v_bits)
    if not 2 * len(indices) * WIDTHS[0] < total < 2 * len(indices) * WIDTHS[-1]:
        raise EvaluationError(
            f"k_bits={kv_cache.k_bits}, v_bits={kv_cache.v_bits}: expected more than {WIDTHS[0]} and fewer than "
            f"{WIDTHS[-1]} bits on average, or there is nothing to divide among layers; take another preset"
        )
    length = windows.shape[1]
    if kv_cache.far_length(length) == 0:
        least = kv_cache.sink_length + kv_cache.near_length + 2 * kv_cache.residual_length
        raise EvaluationError(
            f"windows of {length} tokens: none of them is packed at k_bits and v_bits; expected more than {least}, "
            "better several times as many"
        )
    probes = [
        _OneSide(f"layer {index}", dataclasses.replace(kv_cache, k_bits=k_bits, v_bits=v_bits), index)
        for index in indices
        for k_bits, v_bits in ((_PROBE_BITS, 16), (16, _PROBE_BITS))
    ]
    found = measure_fidelity(model, windows, probes, context=context, chunk=chunk, on_progress=on_progress)
    losses = [max(fidelity.kl_mean, 0.0) for fidelity in found]
    bits = _knapsack(losses, total)
    return [
        LayerShare(index, losses[2 * i], losses[2 * i + 1], bits[2 * i], bits[2 * i + 1])
        for i, index in enumerate(indices)
    ]


def settings(kv_cache: TurboQuantConfig, shares: Sequence[LayerShare]) -> TurboQuantConfig:
    """The settings with the layers' bits."""
    given = tuple((share.layer, share.k_bits, share.v_bits) for share in shares)
    return dataclasses.replace(kv_cache, layer_bits=given)


def _knapsack(losses: Sequence[float], total: int) -> list[int]:
    """Bits for each loss, `total` at most together, such that the sum of losses is least."""
    error = {bits: lloyd_max(128, bits).mse / lloyd_max(128, _PROBE_BITS).mse for bits in WIDTHS}
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by bits spent
    for loss in losses:
        grown: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (sum_so_far, chosen) in best.items():
            for bits in WIDTHS:
                candidate = (sum_so_far + loss * error[bits], (*chosen, bits))
                if spent + bits <= total and candidate < grown.get(spent + bits, (float("inf"), ())):
                    grown[spent + bits] = candidate
        best = grown
    return list(min(best.values())[1])
