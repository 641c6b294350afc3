"""Hadamard-INT: rotate, then uniform integer codes per token and head (as QuaRot and vLLM have it)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turboquant_local.codec import rotation_matrix
from turboquant_local.config import BLOCK_LENGTH
from turboquant_local.evaluation.codecs.uniform import round_trip


@dataclass(frozen=True)
class HadamardInt:
    """Uniform codes between the least and the greatest coordinate of a rotated vector.

    Attributes:
        bits: Bits a coordinate.
    """

    bits: int
    block_length: int = BLOCK_LENGTH

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors after a round trip."""
        rotation = rotation_matrix(x.shape[-1]).to(x.device)
        return round_trip(x @ rotation.T, self.bits) @ rotation

    def bits_per_coordinate(self, head_dim: int) -> float:
        """A code, and a scale and a zero point a vector."""
        return self.bits + 32 / head_dim

    def constant_bytes(self, head_dim: int) -> int:
        """The rotation."""
        return rotation_matrix(head_dim).nbytes
