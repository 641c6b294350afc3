"""What one layer holds of keys or of values, and how it grows, shrinks and is reordered.

All functions return a new `KVView`: tensors are never written to, so a view handed to attention stays true
whatever happens to the cache. Packed tokens are moved and cut, never quantised a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from turboquant_local.codec.centering import key_mean
from turboquant_local.codec.quantizer import Quantizer
from turboquant_local.config import TurboQuantConfig
from turboquant_local.kernels import api
from turboquant_local.kernels.layout import KVView, PackedKV


def empty(like: torch.Tensor) -> KVView:
    """No token yet.

    Args:
        like: `[batch, num_kv_heads, any, head_dim]`: gives shape, dtype and device.
    """
    nothing = like.new_empty(*like.shape[:2], 0, like.shape[3])
    return KVView(nothing, None, nothing)


def append(view: KVView, x: torch.Tensor) -> KVView:
    """Add new tokens at the end, in the model's dtype."""
    recent = torch.cat([view.recent, x], dim=2) if view.recent.shape[2] else x
    return replace(view, recent=recent)


def settle(
    view: KVView, config: TurboQuantConfig, quantizer: Quantizer, center: bool, among_first: int | None = None
) -> KVView:
    """Pack the tokens that have left the recent window, and own every tensor that stays.

    Args:
        view: May hold tensors that belong to the model; they are copied.
        config: How many tokens stay unpacked.
        quantizer: The codec.
        center: Subtract the `key_mean` of the first tokens behind the sinks.
        among_first: Leave the tokens behind the first so many as they are.
    """
    packed = view.packed
    target = config.packed_length(view.shape[2])
    if among_first is not None:
        blocks = max(0, among_first - config.sink_length) // config.block_length
        target = min(target, blocks * config.block_length)
    count = target - (packed.length if packed else 0)
    if count <= 0:
        return replace(view, recent=_owned(view.recent))
    sinks, recent = view.sinks, view.recent
    if packed is None:
        sinks, recent = _owned(recent[:, :, : config.sink_length]), recent[:, :, config.sink_length :]
        mean = None
        if center:
            # Always of the same tokens, so that the codes do not depend on how the prompt arrived.
            mean = key_mean(recent[:, :, : max(config.residual_length, config.block_length)])
        packed = api.quantize_kv(recent[:, :, :count], quantizer, mean)
    else:
        new = api.quantize_kv(recent[:, :, :count], quantizer, packed.mean)
        scales = None if packed.scales is None or new.scales is None else torch.cat([packed.scales, new.scales], dim=2)
        packed = replace(packed, codes=torch.cat([packed.codes, new.codes], dim=2), scales=scales)
    return KVView(sinks, _owned_packed(packed), _owned(recent[:, :, count:]))


def crop(view: KVView, length: int) -> KVView:
    """Keep the first `length` tokens."""
    sink_length = view.sinks.shape[2]
    if view.packed is None:
        return replace(view, recent=_owned(view.recent[:, :, :length]))
    if length <= sink_length:
        return KVView(view.sinks[:, :, :0].clone(), None, _owned(view.sinks[:, :, :length]))
    packed = view.packed
    if length < sink_length + packed.length:
        packed = _owned_packed(packed.tokens(0, length - sink_length))
    kept = max(0, length - sink_length - packed.length)
    return KVView(view.sinks, packed, _owned(view.recent[:, :, :kept]))


def map_tensors(view: KVView, function: Callable[[torch.Tensor], torch.Tensor]) -> KVView:
    """Apply a function of the batch dimension or of the device to every tensor."""
    packed = view.packed
    if packed is not None:
        packed = replace(
            packed,
            codes=function(packed.codes),
            scales=None if packed.scales is None else function(packed.scales),
            mean=None if packed.mean is None else function(packed.mean),
        )
    return KVView(function(view.sinks), packed, function(view.recent))


def dequantize(view: KVView) -> torch.Tensor:
    """All tokens in the model's dtype: `[batch, num_kv_heads, tokens, head_dim]`."""
    if view.packed is None:
        return view.recent
    return torch.cat([view.sinks, api.dequantize_kv(view.packed, view.recent.dtype), view.recent], dim=2)


def _owned(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its storage holds nothing else, otherwise a copy: a slice would pin the whole."""
    exact = x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if exact and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def _owned_packed(packed: PackedKV) -> PackedKV:
    scales = None if packed.scales is None else _owned(packed.scales)
    return replace(packed, codes=_owned(packed.codes), scales=scales)
