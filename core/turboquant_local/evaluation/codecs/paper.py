"""The paper's codecs as they are, for comparison: MSE, inner product, mixed precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turboquant_local.codec import MixedQuantizer, MSEQuantizer, ProductQuantizer, rotation_matrix
from turboquant_local.config import BLOCK_LENGTH


@dataclass(frozen=True)
class TurboQuantMSE:
    """A Lloyd-Max code of every rotated coordinate, and the norm (Algorithm 1).

    Attributes:
        bits: Bits a coordinate.
    """

    bits: int
    block_length: int = BLOCK_LENGTH

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors after a round trip."""
        quantizer = MSEQuantizer(x.shape[-1], self.bits, scale="norm")
        codes, scale = quantizer.quantize(x)
        return quantizer.dequantize(codes, scale.half())

    def bits_per_coordinate(self, head_dim: int) -> float:
        """Codes and a norm."""
        return self.bits + 16 / head_dim

    def constant_bytes(self, head_dim: int) -> int:
        """The rotation, in 32 bits."""
        return rotation_matrix(head_dim).nbytes


@dataclass(frozen=True)
class TurboQuantProd:
    """A code of one bit less, and a 1-bit sketch of the rest: for inner products (Algorithm 2).

    Attributes:
        bits: Bits a coordinate, the sketch's among them.
    """

    bits: int
    block_length: int = BLOCK_LENGTH

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The vectors whose inner products with any query are the codec's estimates."""
        quantizer = ProductQuantizer(x.shape[-1], self.bits)
        return quantizer.dequantize(quantizer.quantize(x))

    def bits_per_coordinate(self, head_dim: int) -> float:
        """Codes, sketch and two norms."""
        return ProductQuantizer(head_dim, self.bits).bytes_per_vector * 8 / head_dim

    def constant_bytes(self, head_dim: int) -> int:
        """The rotation and the sketch's matrix, in 32 bits."""
        return 2 * rotation_matrix(head_dim).nbytes


@dataclass(frozen=True)
class TurboQuantMixed:
    """A quarter of the channels with one bit more: the paper's 2.5 and 3.5 bits (Section 4.3).

    Attributes:
        low_bits: Bits a coordinate of most channels.
        block_length: Tokens of a tile, which share a choice of outlier channels.
    """

    low_bits: int
    block_length: int = 128

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors after a round trip."""
        quantizer = self._quantizer(x.shape[-1])
        tiles = x.unflatten(2, (-1, self.block_length))
        return quantizer.dequantize(quantizer.quantize(tiles, quantizer.outlier_channels(tiles))).flatten(2, 3)

    def bits_per_coordinate(self, head_dim: int) -> float:
        """Codes, two norms a vector, and an index of channels a tile."""
        return self._quantizer(head_dim).stored_bits + 1 / self.block_length

    def constant_bytes(self, head_dim: int) -> int:
        """Both rotations."""
        few = head_dim // 4
        return rotation_matrix(few).nbytes + rotation_matrix(head_dim - few).nbytes

    def _quantizer(self, head_dim: int) -> MixedQuantizer:
        return MixedQuantizer(head_dim, self.low_bits + 1, self.low_bits, head_dim // 4, scale="norm")
