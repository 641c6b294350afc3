"""FP8: eight-bit floating point with a scale a token and head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turboquant_local.config import BLOCK_LENGTH

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class FP8:
    """e4m3 (exponent of 4 bits, mantissa of 3) of x / scale; the scale takes a vector's largest coordinate to 448."""

    block_length: int = BLOCK_LENGTH

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors after a round trip; the scale has 16 bits."""
        scale = (x.abs().amax(-1, keepdim=True) / _LARGEST).bfloat16().float().clamp_min(1e-30)
        # A scale rounded down would push the largest coordinate over the edge, where e4m3 has only NaN.
        codes = (x / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        return codes.float() * scale

    def bits_per_coordinate(self, head_dim: int) -> float:
        """8 and a scale."""
        return 8 + 16 / head_dim

    def constant_bytes(self, head_dim: int) -> int:
        """None."""
        return 0
