"""KIVI (arXiv 2402.02750): uniform codes of keys per channel and of values per token, in groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turboquant_local.errors import EvaluationError
from turboquant_local.evaluation.codecs.uniform import round_trip


@dataclass(frozen=True)
class KIVIKeys:
    """A scale and a zero point for every channel of a group of tokens: outlier channels of keys stay among themselves.

    Attributes:
        bits: Bits a coordinate.
        group: Tokens of a group.
    """

    bits: int
    group: int = 64

    @property
    def block_length(self) -> int:
        """A group of tokens at a time."""
        return self.group

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Keys after a round trip."""
        groups = x.unflatten(2, (-1, self.group)).mT  # [batch, heads, groups, head_dim, tokens]
        return round_trip(groups, self.bits).mT.flatten(2, 3)

    def bits_per_coordinate(self, head_dim: int) -> float:
        """A code, and the group's scale and zero point."""
        return self.bits + 32 / self.group

    def constant_bytes(self, head_dim: int) -> int:
        """None."""
        return 0


@dataclass(frozen=True)
class KIVIValues:
    """A scale and a zero point for every group of neighbouring channels of a token.

    Attributes:
        bits: Bits a coordinate.
        group: Channels of a group; a head smaller than that is one group.
    """

    bits: int
    group: int = 64
    block_length: int = 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Values after a round trip."""
        groups = x.unflatten(-1, (-1, min(self.group, x.shape[-1])))
        return round_trip(groups, self.bits).flatten(-2)

    def bits_per_coordinate(self, head_dim: int) -> float:
        """A code, and the group's scale and zero point.

        Raises:
            EvaluationError: Groups do not divide a head.
        """
        if head_dim % min(self.group, head_dim):
            raise EvaluationError(
                f"group={self.group}: expected a divisor of the head size {head_dim}, or more than it"
            )
        return self.bits + 32 / min(self.group, head_dim)

    def constant_bytes(self, head_dim: int) -> int:
        """None."""
        return 0
