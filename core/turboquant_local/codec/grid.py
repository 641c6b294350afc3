"""A uniform grid of levels, with a step for every vector: a mask decodes what others look up in a table.

Lloyd-Max levels fit the distribution of all vectors. A step chosen for the vector at hand makes up for most of what
equal distances lose: rotated coordinates of one vector have a largest one, and the scale is stored in any case.
"""

from __future__ import annotations

import math

import torch

from turboquant_local.codec.shared import shared

_STEPS = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335}
"""Best steps for a standard normal coordinate; above four bits the largest of 128 coordinates, 2.75, sets it."""

FACTORS = {1: (1.0,), 2: (0.7, 0.6, 0.5), 3: (0.9, 0.8, 0.7), 4: (1.0, 0.93, 0.86, 0.8)}
"""Shares of the step that just holds a vector's largest coordinate, of which each vector takes the best."""


@shared
def grid_centroids(head_dim: int, bits: int) -> torch.Tensor:
    """The levels for a unit vector of ordinary shape, `[2**bits]` float32, increasing and symmetric about 0.

    A vector's own step is in its scale; this one only keeps scales near the norms.
    """
    steps: torch.Tensor = torch.arange(2**bits, dtype=torch.float32) - (2**bits - 1) / 2
    return steps * grid_step(head_dim, bits)


def grid_step(head_dim: int, bits: int) -> float:
    """The distance of neighbouring `grid_centroids`."""
    normal: float = _STEPS.get(bits, 2 * 2.75 / (2**bits - 1))
    return normal / math.sqrt(head_dim)


def vector_steps(y: torch.Tensor, bits: int) -> torch.Tensor:
    """The step for each vector that leaves the least error behind: `[..., tokens, 1]`.

    Args:
        y: `[..., tokens, head_dim]` float32.
        bits: 1 to 8.
    """
    largest = y.abs().amax(-1, keepdim=True).div((2**bits - 1) / 2).clamp_min(torch.finfo(torch.float32).tiny)
    factors = FACTORS.get(bits, (1.0,))
    best_step: torch.Tensor = largest * factors[0]
    if len(factors) == 1:
        return best_step
    best = _fit(y, best_step, bits)
    for factor in factors[1:]:
        step = largest * factor
        fit = _fit(y, step, bits)
        best_step = torch.where(fit > best, step, best_step)
        best = torch.maximum(fit, best)
    return best_step


def _fit(y: torch.Tensor, step: torch.Tensor, bits: int) -> torch.Tensor:
    """Squared cosine between a vector and its levels: whatever their scale, the larger the less error."""
    _, level = nearest_level(y / step, bits)
    return (y * level).sum(-1, keepdim=True).square() / level.square().sum(-1, keepdim=True)


def nearest_level(y: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (int32) and levels, in steps, of coordinates given in steps."""
    half = 2 ** (bits - 1)
    cell = y.floor().clamp_(-half, half - 1)
    return cell.int().add_(half), cell + 0.5
