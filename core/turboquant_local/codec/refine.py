"""Levels moved one by one until a vector and its codes agree better.

Codes are chosen before the scale is known, and the scale is then rounded to a byte. What that leaves wrong is not noise
that averages out over coordinates: it stretches the whole vector, and with it a whole score. So it counts more.
"""

from __future__ import annotations

import torch

STRETCH = 16.0
"""What the error along the vector itself counts, against one across it. A key that matters is one that lies along the
query. From 8 to 40 the loss hardly changes."""

_ROUNDS = 2


def refine_levels(
    y: torch.Tensor, level: torch.Tensor, step: torch.Tensor, bits: int, gram: torch.Tensor | None = None
) -> torch.Tensor:
    """In each round, move that one coordinate of every vector to a neighbouring level which lessens the error most.

    The error of e = step * level - y is e'He + 16 (e'Hy)^2 / y'Hy.

    Args:
        y: `[..., tokens, head_dim]` float32.
        level: Levels in steps, of the same shape.
        step: `[..., tokens, 1]`, what they are read with.
        bits: Bits of a code; levels reach to (2**bits - 1) / 2 on both sides.
        gram: H, `[..., head_dim, head_dim]`, the second moments of the queries; the identity if None.

    Returns:
        Levels.
    """
    error = step * level - y
    weighted = y if gram is None else y @ gram
    gradient = error if gram is None else error @ gram  # half of that of e'He
    diagonal = 1.0 if gram is None else gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    energy = (weighted * y).sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    stretch = STRETCH * (error * weighted).sum(-1, keepdim=True) / energy
    curvature = step * (diagonal + STRETCH * weighted.square() / energy)
    level = level.clone()
    for _ in range(_ROUNDS):
        slope = gradient + stretch * weighted
        sign = -slope.sign()
        change = curvature - 2 * slope.abs()  # of the error by a step against the slope, over the step
        change.masked_fill_(level * sign >= (2**bits - 1) / 2, torch.inf)
        least, at = change.min(-1, keepdim=True)
        move = torch.where(least < 0, sign.gather(-1, at), 0.0)
        level.scatter_add_(-1, at, move)
        move = move * step
        stretch = stretch + STRETCH * move * weighted.gather(-1, at) / energy
        if gram is None:
            gradient = gradient.scatter_add(-1, at, move)
        else:
            gradient = gradient + move * gram.gather(-2, at.expand_as(level))
    return level
