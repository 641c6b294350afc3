"""What one layer holds of keys or of values, and how it grows, shrinks and is reordered.

All functions return a new `KVView`: tensors are never written to, so a view handed to attention stays true
whatever happens to the cache. Packed tokens are moved and cut; only on their way from near to far are they quantised
again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from turboquant_local.codec.quantizer import IdentityQuantizer, MSEQuantizer, Quantizer
from turboquant_local.codec.statistics import HeadStatistics, head_statistics
from turboquant_local.config import TurboQuantConfig
from turboquant_local.kernels import api
from turboquant_local.kernels.layout import KVView, PackedKV


@dataclass(frozen=True)
class SideCodec:
    """How one side, keys or values, of a layer is packed.

    Attributes:
        far: The codec of old tokens.
        near: That of the tokens just before the recent window, with as many bits or more.
        center: Subtract a mean from them.
        weigh: Choose codes with regard to which channels matter.
        packing: Where calls are counted, by the implementation that packed.
    """

    far: Quantizer
    near: Quantizer
    center: bool = False
    weigh: bool = False
    packing: Counter[str] = field(default_factory=Counter, compare=False)

    def statistics(self, sample: torch.Tensor) -> HeadStatistics:
        """What is to be known of a head before its first token is packed."""
        unit = 8 in (self.far.scale_bits, self.near.scale_bits)
        return head_statistics(sample, center=self.center, weigh=self.weigh, unit=unit)


def make_codec(config: TurboQuantConfig, head_dim: int, bits: int, keys: bool) -> SideCodec:
    """The codec of keys or values.

    Args:
        config: The settings.
        head_dim: Size of the vectors.
        bits: Bits of old tokens, the side's own.
        keys: Whether they are keys: only these are centred and weighted.

    Raises:
        ConfigError: The head size cannot be packed or rotated as asked.
    """
    lossy = bits < 16
    return SideCodec(
        far=_quantizer(config, head_dim, bits),
        near=_quantizer(config, head_dim, max(bits, config.near_bits)),
        center=keys and lossy and config.center_keys,
        weigh=keys and lossy and config.error_feedback,
    )


def _quantizer(config: TurboQuantConfig, head_dim: int, bits: int) -> Quantizer:
    if bits == 16:
        return IdentityQuantizer(head_dim)
    scale_bits = config.scale_bits if bits <= 4 else 16
    return MSEQuantizer(head_dim, bits, config.rotation, config.scale, config.seed, scale_bits, config.codebook)


def targets(config: TurboQuantConfig, length: int, among_first: int | None = None) -> tuple[int, int]:
    """How many of a sequence's tokens are to be packed, and how many of those far.

    Args:
        config: The settings.
        length: Tokens of the sequence.
        among_first: Leave the tokens behind the first so many as they are.
    """
    packed = config.packed_length(length)
    if among_first is not None:
        blocks = max(0, among_first - config.sink_length) // config.block_length
        packed = min(packed, blocks * config.block_length)
    return packed, min(config.far_length(length), packed)


def empty(like: torch.Tensor) -> KVView:
    """No token yet.

    Args:
        like: `[batch, num_kv_heads, any, head_dim]`: gives shape, dtype and device.
    """
    nothing = like.new_empty(*like.shape[:2], 0, like.shape[3])
    return KVView(nothing, None, None, nothing)


class Room:
    """Memory for the exact tokens of one layer after the other, while a prompt goes through each in pieces.

    What is there stays where it is when more comes. Tokens lie as a projection leaves them; so strides are those of
    every prompt, for which attention may have a plan already.
    """

    def __init__(self, tokens: int) -> None:
        """Make room, taken with the first of so many tokens."""
        self._tokens = tokens
        self._memory: torch.Tensor | None = None

    def append(self, held: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """All tokens of a layer: `held`, returned before, and new ones `[batch, num_kv_heads, tokens, head_dim]`."""
        batch, heads, count, size = x.shape
        if self._memory is None or self._memory.shape[1:] != (batch, heads, size):
            # Room for one more, so that no view of tokens is the whole: who keeps some must copy them.
            self._memory = x.new_empty(self._tokens + 1, batch, heads, size)
        start, stop = held.shape[2], held.shape[2] + count
        self._memory[start:stop] = x.permute(2, 0, 1, 3)
        return self._memory[:stop].permute(1, 2, 0, 3)


def append(view: KVView, x: torch.Tensor, room: Room | None = None) -> KVView:
    """Add new tokens at the end, in the model's dtype; in `room`, where the others lie too, if it is given."""
    if room is not None:
        return replace(view, recent=room.append(view.recent, x))
    recent = torch.cat([view.recent, x], dim=2) if view.recent.shape[2] else x
    return replace(view, recent=recent)


def settle(
    views: Sequence[KVView],
    config: TurboQuantConfig,
    codec: SideCodec,
    length: int | None = None,
    among_first: int | None = None,
) -> list[KVView]:
    """Pack the tokens that have left the recent window, and own every tensor that stays.

    A token is first packed near, and again far once it is old: so its codes do not depend on how it arrived.

    Args:
        views: One side of layers that hold as many tokens each: they are packed at once, and what is new of them lies
            in one piece of memory. They may hold tensors that belong to the model; those are copied.
        config: How many tokens stay unpacked, and near.
        codec: The codec of this side.
        length: Tokens of the sequence, if more are to come before it is looked at.
        among_first: As for `targets`.
    """
    view = views[0]
    target, far_target = targets(config, length or view.shape[2], among_first)
    if view.statistics is None and view.shape[2] < config.sink_length + config.sample_length:
        target = far_target = 0  # those to come belong to the sample too
    count = max(0, target - view.packed_length)
    leaving = far_target - (view.far.length if view.far else 0)
    if not count and leaving <= 0:
        return [replace(view, recent=_owned(view.recent)) for view in views]
    recent = _stacked([view.recent for view in views])
    known = [view.statistics for view in views if view.statistics is not None]
    sinks = [view.sinks for view in views]
    if known:
        statistics = HeadStatistics.stacked(known)
    else:
        first, recent = _owned(recent[:, :, : config.sink_length]), recent[:, :, config.sink_length :]
        # Always of the same tokens, so that the codes do not depend on how the prompt arrived.
        statistics = codec.statistics(recent[:, :, : config.sample_length])
        sinks, known = list(first.chunk(len(views))), statistics.split(len(views))
    near = None if view.near is None else _stacked_packed([v.near for v in views if v.near is not None], statistics)
    far: PackedKV | None = None
    unweighted = replace(statistics, weights=None)  # near codes are fine enough to be rounded one by one
    if count:
        near = _join(near, api.quantize_kv(recent[:, :, :count], codec.near, unweighted, counted=codec.packing))
    if near is not None and leaving > 0:
        far = api.requantize_kv(near.tokens(0, leaving), codec.far, statistics, counted=codec.packing)
        near = near.tokens(leaving, near.length) if leaving < near.length else None
    new_far, new_near = (_split(_owned_packed(part), known) for part in (far, near))
    left = _owned(recent[:, :, count:]).chunk(len(views))
    joined = (old.far if new is None else _join(old.far, new) for old, new in zip(views, new_far, strict=True))
    return [KVView(*parts) for parts in zip(sinks, joined, new_near, left, known, strict=True)]


def crop(view: KVView, length: int) -> KVView:
    """Keep the first `length` tokens."""
    sink_length = view.sinks.shape[2]
    if not view.packed:
        return replace(view, recent=_owned(view.recent[:, :, :length]))
    if length <= sink_length:
        return KVView(view.sinks[:, :, :0].clone(), None, None, _owned(view.sinks[:, :, :length]))
    far_length = view.far.length if view.far else 0
    far = _cropped(view.far, length - sink_length)
    near = _cropped(view.near, length - sink_length - far_length)
    kept = max(0, length - sink_length - view.packed_length)
    return KVView(view.sinks, far, near, _owned(view.recent[:, :, :kept]), view.statistics)


def map_tensors(view: KVView, function: Callable[[torch.Tensor], torch.Tensor]) -> KVView:
    """Apply a function of the batch dimension or of the device to every tensor."""
    statistics = view.statistics and view.statistics.map(function)

    def mapped_part(part: PackedKV | None) -> PackedKV | None:
        if part is None or statistics is None:
            return None
        unit = None if part.scale_unit is None else statistics.scale_unit
        scales = None if part.scales is None else function(part.scales)
        return PackedKV(part.quantizer, function(part.codes), scales, unit, statistics.mean)

    return KVView(
        function(view.sinks), mapped_part(view.far), mapped_part(view.near), function(view.recent), statistics
    )


def dequantize(view: KVView) -> torch.Tensor:
    """All tokens in use, in the model's dtype: `[batch, num_kv_heads, tokens, head_dim]`."""
    view = view.in_use()
    if not view.packed:
        return view.recent
    parts = [api.dequantize_kv(part, view.recent.dtype) for part in view.packed]
    return torch.cat([view.sinks, *parts, view.recent], dim=2)


def _join(first: PackedKV | None, second: PackedKV) -> PackedKV:
    if first is None:
        return second
    scales = None
    if first.scales is not None and second.scales is not None:
        scales = torch.cat([first.scales, second.scales], dim=2)
    return replace(first, codes=torch.cat([first.codes, second.codes], dim=2), scales=scales)


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _stacked_packed(parts: Sequence[PackedKV], statistics: HeadStatistics) -> PackedKV:
    """Of several layers; `statistics` are those of all of them."""
    scales = [part.scales for part in parts if part.scales is not None]
    return replace(
        parts[0],
        codes=_stacked([part.codes for part in parts]),
        scales=_stacked(scales) if scales else None,
        scale_unit=None if parts[0].scale_unit is None else statistics.scale_unit,
        mean=statistics.mean,
    )


def _split(packed: PackedKV | None, statistics: Sequence[HeadStatistics]) -> Sequence[PackedKV | None]:
    """The layers of `_stacked_packed`, each with its own statistics."""
    count = len(statistics)
    if packed is None:
        return [None] * count
    scales = [None] * count if packed.scales is None else packed.scales.chunk(count)
    return [
        PackedKV(packed.quantizer, codes, scale, None if packed.scale_unit is None else own.scale_unit, own.mean)
        for codes, scale, own in zip(packed.codes.chunk(count), scales, statistics, strict=True)
    ]


def _cropped(packed: PackedKV | None, length: int) -> PackedKV | None:
    if packed is None or length <= 0:
        return None
    return packed if length >= packed.length else _owned_packed(packed.tokens(0, length))


def _owned(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its storage holds nothing else, otherwise a copy: a slice would pin the whole."""
    exact = x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if exact and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def _owned_packed(packed: PackedKV | None) -> PackedKV | None:
    if packed is None:
        return None
    scales = None if packed.scales is None else _owned(packed.scales)
    return replace(packed, codes=_owned(packed.codes), scales=scales)
