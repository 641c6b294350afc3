"""Where the bytes of packed storage lie; no other file knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turboquant_local.codec.packing import packed_size
from turboquant_local.codec.quantizer import SCALE_DTYPE, Quantizer


@dataclass(frozen=True)
class PackedKV:
    """Packed tokens of one side, keys or values, of one layer.

    Attributes:
        quantizer: How to read the codes.
        codes: `[batch, num_kv_heads, tokens, bytes]` uint8; with the identity codec `[..., head_dim]` in the
            model's dtype.
        scales: `[batch, num_kv_heads, tokens]` float16, or None with the identity codec.
        mean: `[batch, num_kv_heads, 1, head_dim]`, subtracted from every vector before it was quantised, or None.
    """

    quantizer: Quantizer
    codes: torch.Tensor
    scales: torch.Tensor | None
    mean: torch.Tensor | None

    @property
    def length(self) -> int:
        """Packed tokens."""
        return self.codes.shape[2]

    def tokens(self, start: int, stop: int) -> PackedKV:
        """A view of the tokens in `[start, stop)`."""
        scales = None if self.scales is None else self.scales[:, :, start:stop]
        return PackedKV(self.quantizer, self.codes[:, :, start:stop], scales, self.mean)


@dataclass(frozen=True)
class KVView:
    """All tokens of one side of one layer, oldest first: sinks, packed tokens, recent window.

    Attributes:
        sinks: `[batch, num_kv_heads, sink_length, head_dim]` in the model's dtype.
        packed: The packed tokens, or None while there are none; then `sinks` is empty too.
        recent: `[batch, num_kv_heads, tokens, head_dim]` in the model's dtype.
    """

    sinks: torch.Tensor
    packed: PackedKV | None
    recent: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(batch, num_kv_heads, tokens, head_dim)` of the whole."""
        batch, heads, _, head_dim = self.recent.shape
        packed = self.packed.length if self.packed else 0
        return batch, heads, self.sinks.shape[2] + packed + self.recent.shape[2], head_dim


def vector_bytes(head_dim: int, bits: int, dtype: torch.dtype) -> int:
    """Bytes of one packed vector, its scale included.

    Args:
        head_dim: Size of the vector.
        bits: 1 to 8, or 16 for the identity codec.
        dtype: The model's dtype.
    """
    if bits == 16:
        return head_dim * dtype.itemsize
    return packed_size(head_dim, bits) + SCALE_DTYPE.itemsize
