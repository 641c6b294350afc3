"""The specification of every operation, in plain torch; runs on any device.

Attention reads the packed tokens tile by tile and never holds the decompressed keys or values of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from turboquant_local.codec.quantizer import Quantizer
from turboquant_local.kernels.layout import KVView, PackedKV

_TILE_ELEMENTS = 2**17
"""Most float32 elements of a tile of keys, values or scores (0.5 MiB): small beside the cache, and no slower."""

_QUANTIZE_TOKENS = 4096
"""Tokens quantised at once; bounds the float32 copies during prefill."""


def quantize_kv(x: torch.Tensor, quantizer: Quantizer, mean: torch.Tensor | None) -> PackedKV:
    """See `kernels.api.quantize_kv`."""
    parts = [
        quantizer.quantize(part if mean is None else part.float() - mean.float())
        for part in x.split(_QUANTIZE_TOKENS, dim=2)
    ]
    codes = [codes for codes, _ in parts]
    scales = [scale for _, scale in parts if scale is not None]
    return PackedKV(quantizer, _join(codes), _join(scales) if scales else None, mean)


def dequantize_kv(packed: PackedKV, dtype: torch.dtype) -> torch.Tensor:
    """See `kernels.api.dequantize_kv`."""
    batch, heads, tokens = packed.codes.shape[:3]
    out = torch.empty(batch, heads, tokens, packed.quantizer.head_dim, dtype=dtype, device=packed.codes.device)
    step = _tile_length(batch * heads * packed.quantizer.head_dim)
    for start in range(0, tokens, step):
        tile = packed.tokens(start, start + step)
        x = packed.quantizer.levels(tile.codes)
        if tile.scales is not None:
            x = x * tile.scales.float().unsqueeze(-1)
        x = packed.quantizer.unrotate(x)
        out[:, :, start : start + step] = x if packed.mean is None else x + packed.mean.float()
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
    batch, q_heads, q_length, _ = query.shape
    _, kv_heads, kv_length, v_dim = values.shape
    group = q_heads // kv_heads
    rows = query.float().reshape(batch, kv_heads, group * q_length, -1)  # a KV head's queries, [group, q_length]
    softmax = _OnlineSoftmax(sink_logits, rows, v_dim, group, q_length)
    step = _tile_length(batch * max(kv_heads * max(rows.shape[-1], v_dim), q_heads * q_length))

    def add(scores: torch.Tensor, start: int, tile: torch.Tensor, scales: torch.Tensor | None, rotated: bool) -> None:
        scores = scores * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = _masked(scores, mask, causal, start, kv_length, (batch, kv_heads, group, q_length))
        softmax.add(scores, tile, scales, rotated)

    position = 0
    for key_part, value_part in ((keys.sinks, values.sinks), (keys.recent, values.recent)):
        for start, stop in _tiles(key_part.shape[2], step):
            scores = rows @ key_part[:, :, start:stop].float().mT
            add(scores, position + start, value_part[:, :, start:stop].float(), None, rotated=False)
        position = kv_length - keys.recent.shape[2]
    if keys.packed is None or values.packed is None:
        return softmax.result(None).to(query.dtype).view(batch, q_heads, q_length, v_dim)
    rotated_rows = keys.packed.quantizer.rotate(rows)
    # A mean taken off every packed key comes back as one constant per query.
    offset = None if keys.packed.mean is None else rows @ keys.packed.mean.float().mT  # [B, Hkv, rows, 1]
    for start, stop in _tiles(keys.packed.length, step):
        key_tile, value_tile = keys.packed.tokens(start, stop), values.packed.tokens(start, stop)
        scores = rotated_rows @ keys.packed.quantizer.levels(key_tile.codes).mT
        if key_tile.scales is not None:
            scores = scores * key_tile.scales.float().unsqueeze(2)
        if offset is not None:
            scores = scores + offset
        levels = values.packed.quantizer.levels(value_tile.codes)
        add(scores, keys.sinks.shape[2] + start, levels, value_tile.scales, rotated=True)
    return softmax.result(values.packed.quantizer).to(query.dtype).view(batch, q_heads, q_length, v_dim)


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
            weights = weights * scales.float().unsqueeze(2)
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


def _tile_length(elements_per_token: int) -> int:
    return max(32, _TILE_ELEMENTS // elements_per_token)


def _tiles(length: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
