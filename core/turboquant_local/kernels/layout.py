"""Where the bytes of packed storage lie; no other file knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turboquant_local.codec.packing import packed_size
from turboquant_local.codec.quantizer import Quantizer
from turboquant_local.codec.scales import half_scales, scale_codes, scales_of
from turboquant_local.codec.statistics import HeadStatistics


@dataclass(frozen=True)
class PackedKV:
    """Packed tokens of one side, keys or values, of one layer.

    Attributes:
        quantizer: How to read the codes.
        codes: `[batch, num_kv_heads, tokens, bytes]` uint8; with the identity codec `[..., head_dim]` in the
            model's dtype.
        scales: `[batch, num_kv_heads, tokens]`, as `quantizer.scale_bits` says float16, or uint8 codes of the
            logarithm (see `scale_values`), or None with the identity codec.
        scale_unit: `[batch, num_kv_heads, 1]` float32, the unit of 8-bit scales, else None.
        mean: `[batch, num_kv_heads, 1, head_dim]`, subtracted from every vector before it was quantised, or None.
    """

    quantizer: Quantizer
    codes: torch.Tensor
    scales: torch.Tensor | None
    scale_unit: torch.Tensor | None
    mean: torch.Tensor | None

    @property
    def length(self) -> int:
        """Packed tokens."""
        return self.codes.shape[2]

    def tokens(self, start: int, stop: int) -> PackedKV:
        """A view of the tokens in `[start, stop)`."""
        scales = None if self.scales is None else self.scales[:, :, start:stop]
        return PackedKV(self.quantizer, self.codes[:, :, start:stop], scales, self.scale_unit, self.mean)

    def scale_values(self) -> torch.Tensor | None:
        """The scales as numbers: `[batch, num_kv_heads, tokens]` float32, or None with the identity codec."""
        if self.scales is None or self.scale_unit is None:
            return None if self.scales is None else self.scales.float()
        return scales_of(self.scales, self.scale_unit)


def store_scales(scales: torch.Tensor, unit: torch.Tensor | None) -> torch.Tensor:
    """Scales as they are stored: uint8 for a unit, else float16 (see `codec.scales`).

    Args:
        scales: `[batch, num_kv_heads, tokens]` float32, 0 or more.
        unit: `[batch, num_kv_heads, 1]` float32, or None.
    """
    return half_scales(scales) if unit is None else scale_codes(scales, unit)


@dataclass(frozen=True)
class KVView:
    """All tokens of one side of one layer, oldest first: sinks, far and near packed tokens, recent window.

    Attributes:
        sinks: `[batch, num_kv_heads, sink_length, head_dim]` in the model's dtype; none while nothing is packed.
        far: The oldest packed tokens, or None.
        near: The packed tokens after them, with more bits, or None.
        recent: `[batch, num_kv_heads, tokens, head_dim]` in the model's dtype.
        statistics: With which more tokens are to be packed, or None while nothing is.
        lengths: Tokens in use of `sinks`, `far`, `near` and `recent`, int32 `[4]` on their device; or None if all
            are. With it the shapes are capacities, and the tokens in use are the first of each buffer: so a captured
            CUDA graph can go on while they grow.
    """

    sinks: torch.Tensor
    far: PackedKV | None
    near: PackedKV | None
    recent: torch.Tensor
    statistics: HeadStatistics | None = None
    lengths: torch.Tensor | None = None

    @property
    def packed(self) -> tuple[PackedKV, ...]:
        """The packed parts there are, oldest first."""
        return tuple(part for part in (self.far, self.near) if part is not None)

    @property
    def packed_length(self) -> int:
        """Packed tokens of all parts."""
        return sum(part.length for part in self.packed)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(batch, num_kv_heads, tokens, head_dim)` of the whole."""
        batch, heads, _, head_dim = self.recent.shape
        return batch, heads, self.sinks.shape[2] + self.packed_length + self.recent.shape[2], head_dim

    def in_use(self) -> KVView:
        """A view of the tokens in use, without `lengths`, which are read on the host: that waits for the device."""
        return self if self.lengths is None else self.first(*self.lengths.tolist())

    def first(self, sinks: int, far: int, near: int, recent: int) -> KVView:
        """A view of so many tokens at the start of each part."""
        return KVView(
            self.sinks[:, :, :sinks],
            self.far.tokens(0, far) if self.far and far else None,
            self.near.tokens(0, near) if self.near and near else None,
            self.recent[:, :, :recent],
            self.statistics if far + near else None,
        )


def vector_bytes(quantizer: Quantizer, dtype: torch.dtype) -> int:
    """Bytes of one packed vector, its scale included.

    Args:
        quantizer: The codec.
        dtype: The model's dtype, in which the identity codec keeps vectors.
    """
    if quantizer.bits == 16:
        return quantizer.head_dim * dtype.itemsize
    return packed_size(quantizer.head_dim, quantizer.bits) + quantizer.scale_bits // 8
