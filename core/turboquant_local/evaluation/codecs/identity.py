"""Nothing lost: what the measurement itself costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turboquant_local.config import BLOCK_LENGTH


@dataclass(frozen=True)
class Identity:
    """Stores 16 bits a coordinate."""

    block_length: int = BLOCK_LENGTH

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The vectors themselves."""
        return x

    def bits_per_coordinate(self, head_dim: int) -> float:
        """16."""
        return 16.0

    def constant_bytes(self, head_dim: int) -> int:
        """None."""
        return 0
