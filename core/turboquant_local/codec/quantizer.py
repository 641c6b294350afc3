"""Quantizers of vectors: TurboQuant's MSE quantizer, and the identity for tests of equality.

Both have the same methods in the same order. Codes are made by `quantize` and read back as `levels`: vectors in
rotated space, still without their scale. Attention works there; only `dequantize` rotates back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from turboquant_local.codec.codebook import lloyd_max
from turboquant_local.codec.feedback import feedback_codes
from turboquant_local.codec.packing import aligned, byte_codes, pack_codes, packed_size, planes, unpack_codes
from turboquant_local.codec.rotation import rotation_matrix
from turboquant_local.config import Rotation, Scale


class Quantizer(Protocol):
    """What the cache and the kernels need of a codec."""

    @property
    def head_dim(self) -> int:
        """Size of the vectors."""

    @property
    def bits(self) -> int:
        """Bits a coordinate."""

    @property
    def scale_bits(self) -> int:
        """Bits in which the storage keeps a vector's scale: 8, 16, or 0 if there is none."""

    def quantize(
        self, x: torch.Tensor, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Packed codes and, where the codec has one, the scale of every vector."""

    def encode(self, y: torch.Tensor, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`quantize` for vectors that are rotated already."""

    def levels(self, codes: torch.Tensor) -> torch.Tensor:
        """The vectors that packed codes stand for, rotated and without scale: `[..., head_dim]` float32."""

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Into the space of `levels`; float32."""

    def unrotate(self, x: torch.Tensor) -> torch.Tensor:
        """Back from it; float32."""

    def constants(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The tensors the codec itself keeps on a device."""


@dataclass(frozen=True)
class IdentityQuantizer:
    """Keeps vectors as they are, through the same blocks as the others."""

    head_dim: int
    bits: int = 16
    scale_bits: int = 0

    def quantize(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        """The vectors themselves, `[..., head_dim]`, in their own dtype."""
        return x.contiguous(), None

    def encode(self, y: torch.Tensor, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        """The vectors themselves."""
        return self.quantize(y)

    def levels(self, codes: torch.Tensor) -> torch.Tensor:
        """The vectors in float32."""
        return codes.float()

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """No rotation."""
        return x.float()

    def unrotate(self, x: torch.Tensor) -> torch.Tensor:
        """No rotation."""
        return x.float()

    def constants(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """None."""
        return ()


@dataclass(frozen=True)
class MSEQuantizer:
    """TurboQuant_mse (paper, Algorithm 1): rotate, then the Lloyd-Max code of every coordinate.

    Attributes:
        head_dim: Size of the vectors, a multiple of 8.
        bits: Bits a coordinate, 1 to 8.
        rotation: Kind of rotation.
        scale: What is stored beside the codes in 16 bits: "norm" |x| (the paper), "unbiased" |x|^2 / <x, x̂>
            (inner products without bias, EDEN's choice), "least_error" <x, x̂> / |x̂|^2.
        seed: Seed of the rotation.
        scale_bits: Bits in which the storage keeps the scale, 8 or 16. `quantize` itself gives float32.

    Raises:
        ConfigError: A head size that cannot be packed or rotated this way.
    """

    head_dim: int
    bits: int
    rotation: Rotation = "auto"
    scale: Scale = "unbiased"
    seed: int = 0
    scale_bits: int = 16

    def __post_init__(self) -> None:
        packed_size(self.head_dim, self.bits)
        rotation_matrix(self.head_dim, self.rotation, self.seed)

    def quantize(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantise vectors.

        Args:
            x: `[..., tokens, head_dim]`, any float dtype, any norm.
            weights: `[..., 1, head_dim]`, above 0: how much an error counts in each channel of x (the expected square
                of a query there). With them, codes are chosen by error feedback (`codec.feedback`), and the scale's
                inner products are weighted likewise.

        Returns:
            Packed codes `[..., tokens, head_dim * bits / 8]` uint8 and scales `[..., tokens]` float32.
        """
        return self.encode(self.rotate(x), weights)

    def encode(self, y: torch.Tensor, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`quantize` for vectors y = Π x that are rotated already, in float32."""
        constants = _constants(self, y.device)
        norm = y.norm(dim=-1, keepdim=True)
        y = y / norm.clamp_min(torch.finfo(torch.float32).tiny)
        if weights is None:
            weighted = y
            codes = torch.bucketize(y, constants.boundaries, out_int32=True)
        else:
            weighted = self.rotate(self.unrotate(y) * weights.float())
            codes = feedback_codes(y, constants.centroids, constants.boundaries, weights, constants.rotation)
        packed = pack_codes(codes.to(torch.uint8), self.bits)
        if self.scale != "norm":
            level = constants.centroids[codes]
            dot = (weighted * level).sum(-1, keepdim=True)
            if self.scale == "unbiased":
                unit_scale = (weighted * y).sum(-1, keepdim=True) / dot
            else:
                unit_scale = dot / self._weighted_square(level, weights)
            norm = torch.where(norm > 0, norm * unit_scale, norm)
        return packed, norm.squeeze(-1)

    def _weighted_square(self, y: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        if weights is not None:
            y = self.unrotate(y) * weights.float().sqrt()
        return y.square().sum(-1, keepdim=True)

    def levels(self, codes: torch.Tensor) -> torch.Tensor:
        """The centroids of packed codes: `[..., head_dim]` float32."""
        constants = _constants(self, codes.device)
        if len(planes(self.bits)) == 1:  # a byte looks up all its centroids at once
            return torch.nn.functional.embedding(aligned(codes, self.bits).int(), constants.byte_levels).flatten(-2)
        return constants.centroids.take(unpack_codes(codes, self.bits).long())

    def dequantize(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The vectors x̂ that codes and scales stand for: `[..., head_dim]` float32."""
        return self.unrotate(self.levels(codes) * scale.float().unsqueeze(-1))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """`Π x` in float32."""
        return x.float() @ _constants(self, x.device).rotation.T

    def unrotate(self, x: torch.Tensor) -> torch.Tensor:
        """`Π.T x` in float32."""
        return x.float() @ _constants(self, x.device).rotation

    def constants(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Rotation, centroids, boundaries and the table of bytes."""
        constants = _constants(self, device)
        return constants.rotation, constants.centroids, constants.boundaries, constants.byte_levels


@dataclass(frozen=True)
class _Constants:
    rotation: torch.Tensor
    centroids: torch.Tensor
    boundaries: torch.Tensor
    byte_levels: torch.Tensor  # [256, codes a byte]; empty for widths of several planes


@lru_cache(maxsize=64)
def _constants(quantizer: MSEQuantizer, device: torch.device) -> _Constants:
    """One copy a process and device, shared by all layers and caches."""
    codebook = lloyd_max(quantizer.head_dim, quantizer.bits)
    centroids = codebook.centroids.float().to(device)
    single = len(planes(quantizer.bits)) == 1
    return _Constants(
        _rotation_on(quantizer.head_dim, quantizer.rotation, quantizer.seed, device),
        centroids,
        codebook.boundaries.float().to(device),
        centroids[byte_codes(quantizer.bits, device).int()] if single else centroids[:0],
    )


@lru_cache(maxsize=64)
def _rotation_on(head_dim: int, kind: Rotation, seed: int, device: torch.device) -> torch.Tensor:
    """Shared by quantizers of different bits."""
    return rotation_matrix(head_dim, kind, seed).to(device)
