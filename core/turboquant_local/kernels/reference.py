"""The specification of every operation, in plain torch; runs on any device.

Attention reads the packed tokens tile by tile and never holds the decompressed keys or values of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from turboquant_local.codec.quantizer import Quantizer
from turboquant_local.codec.statistics import HeadStatistics
from turboquant_local.kernels.layout import KVView, PackedKV, store_scales

_TILE_ELEMENTS = {"cpu": 2**17, "cuda": 2**23}
"""Most float32 elements of a tile of keys, values or scores: small beside the cache, and no slower than larger ones."""

_QUANTIZE_TOKENS = 4096
"""Tokens quantised at once; bounds the float32 copies during prefill."""


def quantize_kv(x: torch.Tensor, quantizer: Quantizer, statistics: HeadStatistics) -> PackedKV:
    """See `kernels.api.quantize_kv`."""
    mean = statistics.mean
    parts = [
        quantizer.quantize(part if mean is None else part.float() - mean.float(), statistics.weights)
        for part in x.split(_QUANTIZE_TOKENS, dim=2)
    ]
    return _store(parts, quantizer, statistics)


def requantize_kv(packed: PackedKV, quantizer: Quantizer, statistics: HeadStatistics) -> PackedKV:
    """See `kernels.api.requantize_kv`."""
    parts = []
    for start, stop in _tiles(packed.length, _QUANTIZE_TOKENS):
        parts.append(quantizer.encode(_rotated(packed.tokens(start, stop)), statistics.weights))
    return _store(parts, quantizer, statistics)


def _store(
    parts: list[tuple[torch.Tensor, torch.Tensor | None]], quantizer: Quantizer, statistics: HeadStatistics
) -> PackedKV:
    unit = statistics.scale_unit if quantizer.scale_bits == 8 else None
    scales = [store_scales(scale, unit) for _, scale in parts if scale is not None]
    codes = _join([codes for codes, _ in parts])
    return PackedKV(quantizer, codes, _join(scales) if scales else None, unit, statistics.mean)


def _rotated(packed: PackedKV) -> torch.Tensor:
    """The vectors that packed tokens stand for, still rotated and without their mean, in float32."""
    x = packed.quantizer.levels(packed.codes)
    scales = packed.scale_values()
    return x if scales is None else x * scales.unsqueeze(-1)


def dequantize_kv(packed: PackedKV, dtype: torch.dtype) -> torch.Tensor:
    """See `kernels.api.dequantize_kv`."""
    batch, heads, tokens = packed.codes.shape[:3]
    out = torch.empty(batch, heads, tokens, packed.quantizer.head_dim, dtype=dtype, device=packed.codes.device)
    step = _tile_length(batch * heads * packed.quantizer.head_dim, out.device)
    for start, stop in _tiles(tokens, step):
        x = packed.quantizer.unrotate(_rotated(packed.tokens(start, stop)))
        out[:, :, start:stop] = x if packed.mean is None else x + packed.mean.float()
    return out


def attention(
    query: torch.Tensor,
    keys: KVView,
    values: KVView,
    *,
    mask: torch.Tensor | None,
    causal: bool,
    scaling: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """See `kernels.api.attention`."""
    keys, values = keys.in_use(), values.in_use()
    batch, q_heads, q_length, _ = query.shape
    _, kv_heads, kv_length, v_dim = values.shape
    group = q_heads // kv_heads
    rows = query.float().reshape(batch, kv_heads, group * q_length, -1)  # a KV head's queries, [group, q_length]
    softmax = _OnlineSoftmax(sink_logits, rows, v_dim, group, q_length)
    step = _tile_length(batch * max(kv_heads * max(rows.shape[-1], v_dim), q_heads * q_length), query.device)

    def add(scores: torch.Tensor, start: int, tile: torch.Tensor, scales: torch.Tensor | None, rotated: bool) -> None:
        scores = scores * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = _masked(scores, mask, causal, start, kv_length, (batch, kv_heads, group, q_length))
        softmax.add(scores, tile, scales, rotated)

    position = 0
    for plain_keys, plain_values in ((keys.sinks, values.sinks), (keys.recent, values.recent)):
        for start, stop in _tiles(plain_keys.shape[2], step):
            scores = rows @ plain_keys[:, :, start:stop].float().mT
            add(scores, position + start, plain_values[:, :, start:stop].float(), None, rotated=False)
        position = kv_length - keys.recent.shape[2]
    position = keys.sinks.shape[2]
    offset = None
    for key_part, value_part in zip(keys.packed, values.packed, strict=True):
        rotated_rows = key_part.quantizer.rotate(rows)
        if key_part.mean is not None:  # taken off every packed key, it comes back as one constant per query
            offset = rows @ key_part.mean.float().mT  # [B, Hkv, rows, 1]
        for start, stop in _tiles(key_part.length, step):
            key_tile, value_tile = key_part.tokens(start, stop), value_part.tokens(start, stop)
            scores = rotated_rows @ key_tile.quantizer.levels(key_tile.codes).mT
            key_scales = key_tile.scale_values()
            if key_scales is not None:
                scores = scores * key_scales.unsqueeze(2)
            if offset is not None:
                scores = scores + offset
            levels = value_tile.quantizer.levels(value_tile.codes)
            add(scores, position + start, levels, value_tile.scale_values(), rotated=True)
        position += key_part.length
    # All parts of a side are rotated alike.
    quantizer = values.packed[0].quantizer if values.packed else None
    return softmax.result(quantizer).to(query.dtype).view(batch, q_heads, q_length, v_dim)


class _OnlineSoftmax:
    """Softmax-weighted sum of values, one tile after the other (Milakov and Gimelshein, arXiv 1805.02867)."""

    def __init__(
        self, sink_logits: torch.Tensor | None, rows: torch.Tensor, v_dim: int, group: int, q_length: int
    ) -> None:
        shape = rows.shape[:3]
        if sink_logits is None:
            self.maximum = rows.new_full((*shape, 1), -torch.inf)
            self.total = rows.new_zeros(*shape, 1)
        else:  # a logit that takes part in the softmax and has no value
            logits = sink_logits.float().view(1, shape[1], group, 1).expand(shape[0], -1, -1, q_length)
            self.maximum = logits.reshape(*shape, 1)
            self.total = rows.new_ones(*shape, 1)
        self.plain = rows.new_zeros(*shape, v_dim)
        self.rotated = rows.new_zeros(*shape, v_dim)

    def add(self, scores: torch.Tensor, tile: torch.Tensor, scales: torch.Tensor | None, rotated: bool) -> None:
        maximum = torch.maximum(self.maximum, scores.amax(-1, keepdim=True))
        base = maximum.masked_fill(maximum == -torch.inf, 0.0)  # a row that sees nothing yet
        decay = torch.exp(self.maximum - base)
        weights = torch.exp(scores - base)
        self.maximum, self.total = maximum, self.total * decay + weights.sum(-1, keepdim=True)
        if scales is not None:
            weights = weights * scales.unsqueeze(2)
        part = weights @ tile
        self.plain = self.plain * decay + (0.0 if rotated else part)
        self.rotated = self.rotated * decay + (part if rotated else 0.0)

    def result(self, quantizer: Quantizer | None) -> torch.Tensor:
        out = self.plain if quantizer is None else self.plain + quantizer.unrotate(self.rotated)
        return out / self.total.clamp_min(torch.finfo(torch.float32).tiny)


def _masked(
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    start: int,
    kv_length: int,
    shape: tuple[int, int, int, int],
) -> torch.Tensor:
    """Scores of the keys from `start` on, with the forbidden ones at -inf."""
    batch, kv_heads, group, q_length = shape
    stop = start + scores.shape[-1]
    if mask is not None:
        part = mask[..., start:stop]
        if part.shape[1] == kv_heads * group:  # one mask per query head
            part = part.reshape(-1, kv_heads, group, part.shape[2], part.shape[3])
        else:
            part = part.unsqueeze(2)
        grouped = scores.view(batch, kv_heads, group, q_length, -1)
        grouped = grouped.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else grouped + part.float()
        return grouped.reshape(scores.shape)
    if causal and stop > kv_length - q_length + 1:
        last_visible = torch.arange(kv_length - q_length, kv_length, device=scores.device).repeat(group)
        future = torch.arange(start, stop, device=scores.device) > last_visible[:, None]
        return scores.masked_fill(future, -torch.inf)
    return scores


def _tile_length(elements_per_token: int, device: torch.device) -> int:
    return max(32, _TILE_ELEMENTS.get(device.type, 2**17) // elements_per_token)


def _tiles(length: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
