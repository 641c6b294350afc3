"""Quantizers of vectors: TurboQuant's MSE quantizer, and the identity for tests of equality.

Both have the same methods in the same order. Codes are made by `quantize` and read back as `levels`: vectors in
rotated space, still without their scale. Attention works there; only `dequantize` rotates back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from turboquant_local.codec.codebook import lloyd_max
from turboquant_local.codec.feedback import Nearest, feedback_codes
from turboquant_local.codec.grid import grid_centroids, grid_step, nearest_level, vector_steps
from turboquant_local.codec.packing import byte_codes, pack_codes, packed_size, planes, unpack_codes
from turboquant_local.codec.refine import refine_levels
from turboquant_local.codec.rotation import rotation_matrix
from turboquant_local.codec.scales import rounded_scales
from turboquant_local.codec.shared import shared
from turboquant_local.config import CodebookName, Rotation, Scale


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
    """TurboQuant_mse (paper, Algorithm 1): rotate, then code every coordinate.

    Attributes:
        head_dim: Size of the vectors, a multiple of 8.
        bits: Bits a coordinate, 1 to 8.
        rotation: Kind of rotation.
        scale: What is stored beside the codes: "norm" |x| (the paper), "unbiased" |x|^2 / <x, x̂>
            (inner products without bias, EDEN's choice), "least_error" <x, x̂> / |x̂|^2.
        seed: Seed of the rotation.
        scale_bits: Bits in which the storage keeps the scale, 8 or 16. `quantize` itself gives float32.
        codebook: "lloyd_max" (the paper), or "grid": equal distances, with a step for every vector (`codec.grid`).

    Raises:
        ConfigError: A width that is not offered, or a head size that cannot be packed or rotated this way.
    """

    head_dim: int
    bits: int
    rotation: Rotation = "auto"
    scale: Scale = "unbiased"
    seed: int = 0
    scale_bits: int = 16
    codebook: CodebookName = "lloyd_max"

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
        gram = None if weights is None else (constants.rotation * weights.float()) @ constants.rotation.T
        weighted = y if gram is None else y @ gram
        if self.codebook == "grid":
            step, spacing = vector_steps(y, self.bits), grid_step(self.head_dim, self.bits)
            nearest: Nearest = partial(nearest_level, bits=self.bits)
        else:
            step, spacing = torch.ones_like(norm), 1.0
            nearest = partial(_nearest_centroid, constants)
        if weights is None:
            codes, level = nearest(y / step)
        else:
            codes, level = feedback_codes(y / step, nearest, weights, constants.rotation)
        scale = torch.where(norm > 0, norm * self._unit_scale(y, weighted, level, step, gram) / spacing, 0.0)
        if self.codebook == "grid" and self.scale_bits == 8:
            scale = rounded_scales(scale)
            step = scale * spacing / norm.clamp_min(torch.finfo(torch.float32).tiny)
            codes = (refine_levels(y, weighted, level, step, self.bits, gram) + (2**self.bits - 1) / 2).int()
        return pack_codes(codes.to(torch.uint8), self.bits), scale.squeeze(-1)

    def _unit_scale(
        self,
        y: torch.Tensor,
        weighted: torch.Tensor,
        level: torch.Tensor,
        step: torch.Tensor,
        gram: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the levels of unit vectors are to be multiplied by, `[..., tokens, 1]`."""
        if self.scale == "norm":
            return step
        dot = (weighted * level).sum(-1, keepdim=True)
        if self.scale == "unbiased":
            return (weighted * y).sum(-1, keepdim=True) / dot
        return dot / ((level if gram is None else level @ gram) * level).sum(-1, keepdim=True)

    def levels(self, codes: torch.Tensor) -> torch.Tensor:
        """The centroids of packed codes: `[..., head_dim]` float32."""
        constants = _constants(self, codes.device)
        if len(planes(self.bits)) == 1:  # a byte looks up all its centroids at once
            return torch.nn.functional.embedding(codes.int(), constants.byte_levels).flatten(-2)
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


def _nearest_centroid(constants: _Constants, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and centroids of unit vectors' coordinates."""
    codes = torch.bucketize(y.contiguous(), constants.boundaries, out_int32=True)
    return codes, constants.centroids.take(codes.long())


@shared
def _constants(quantizer: MSEQuantizer, device: torch.device) -> _Constants:
    """One copy a process and device, shared by all layers and caches."""
    if quantizer.codebook == "grid":
        centroids = grid_centroids(quantizer.head_dim, quantizer.bits).to(device)
    else:
        centroids = lloyd_max(quantizer.head_dim, quantizer.bits).centroids.float().to(device)
    single = len(planes(quantizer.bits)) == 1
    return _Constants(
        _rotation_on(quantizer.head_dim, quantizer.rotation, quantizer.seed, device),
        centroids,
        (centroids[1:] + centroids[:-1]) / 2,
        centroids[byte_codes(quantizer.bits, device).int()] if single else centroids[:0],
    )


@shared
def _rotation_on(head_dim: int, kind: Rotation, seed: int, device: torch.device) -> torch.Tensor:
    """Shared by quantizers of different bits."""
    return rotation_matrix(head_dim, kind, seed).to(device)
