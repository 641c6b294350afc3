"""Scales as they are stored: in float16, or in one byte, as logarithms in steps that are the same everywhere."""

from __future__ import annotations

import torch

STEPS_PER_OCTAVE = 32
"""Of an 8-bit scale: neighbours differ by 2.2 %. Units are such scales too, so that all scales lie on one grid: who
chooses codes knows the scale they will be read with, and can make up for its rounding."""

UNIT_CODE = 96
"""Code of a scale equal to its unit. 0 is a scale of 0; the others reach from 1/8 of the unit to 31 times."""


def half_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales in float16, the largest instead of infinity."""
    return scales.clamp(max=torch.finfo(torch.float16).max).to(torch.float16)


def rounded_scales(scales: torch.Tensor) -> torch.Tensor:
    """The nearest scales (by ratio) that one byte can stand for, as long as their unit is not too far off; 0 stays."""
    return torch.where(scales > 0, ((scales.log2() * STEPS_PER_OCTAVE).round() / STEPS_PER_OCTAVE).exp2(), 0.0)


def scale_codes(scales: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Bytes for scales, uint8.

    What is too large is held at the largest scale; what is nearer to 0 than to the smallest becomes 0.

    Args:
        scales: Float32, 0 or more.
        unit: Of a shape that fits, above 0.
    """
    codes = ((scales / unit).log2() * STEPS_PER_OCTAVE).round() + UNIT_CODE
    smallest = 2.0 ** ((1 - UNIT_CODE) / STEPS_PER_OCTAVE)
    return torch.where(scales < unit * smallest / 2, 0.0, codes.clamp(1, 255)).to(torch.uint8)


def scales_of(codes: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The scales that bytes stand for, float32."""
    octaves = (codes.float() - UNIT_CODE) / STEPS_PER_OCTAVE
    return torch.where(codes > 0, unit * octaves.exp2(), 0.0)
