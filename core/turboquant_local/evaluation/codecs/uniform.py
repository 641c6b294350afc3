"""Uniform integer codes between the least and the greatest number of a group, as most integer codecs have them."""

from __future__ import annotations

import torch


def round_trip(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of `bits` bits along the last dimension, and back; scale and zero point have 16 bits each.

    Args:
        x: `[..., group]` float32.
        bits: 1 to 8.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = _sixteen_bits((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.bfloat16).tiny)
    low = _sixteen_bits(low)
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


def _sixteen_bits(x: torch.Tensor) -> torch.Tensor:
    """float16 keeps three more bits than bfloat16; what it cannot hold stays in bfloat16's range."""
    half = x.half().float()
    return torch.where(half.isfinite(), half, x.bfloat16().float())
