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
    y: torch.Tensor,
    weighted: torch.Tensor,
    level: torch.Tensor,
    step: torch.Tensor,
    bits: int,
    gram: torch.Tensor | None = None,
) -> torch.Tensor:
    """In each round, move that one coordinate of every vector to a neighbouring level which lessens the error most.

    The error of e = step * level - y is e'He + 16 (e'Hy)^2 / y'Hy.

    Args:
        y: `[..., tokens, head_dim]` float32.
        weighted: Hy, of the same shape.
        level: Levels in steps, likewise.
        step: `[..., tokens, 1]`, what they are read with.
        bits: Bits of a code; levels reach to (2**bits - 1) / 2 on both sides.
        gram: H, `[..., head_dim, head_dim]`, the second moments of the queries; the identity if None.

    Returns:
        Levels.
    """
    error = step * level - y
    gradient = error if gram is None else error @ gram  # half of that of e'He
    diagonal = 1.0 if gram is None else gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    along = STRETCH / (weighted * y).sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    stretch = along * (error * weighted).sum(-1, keepdim=True)
    curvature = step * (diagonal + along * weighted.square())
    level = level.clone()
    for left in reversed(range(_ROUNDS)):
        slope = torch.addcmul(gradient, stretch, weighted)
        moved = level - slope.sign()
        change = torch.sub(curvature, slope.abs_(), alpha=2)  # of the error by a step against the slope, over the step
        change.masked_fill_(moved.abs() > (2**bits - 1) / 2, torch.inf)
        least, at = change.min(-1, keepdim=True)
        before = level.gather(-1, at)
        after = torch.where(least < 0, moved.gather(-1, at), before)
        level.scatter_(-1, at, after)
        if left:
            move = (after - before) * step
            stretch = torch.addcmul(stretch, move * along, weighted.gather(-1, at))
            if gram is None:
                gradient = gradient.scatter_add(-1, at, move)
            else:
                gradient = torch.addcmul(gradient, move, _rows(gram, at))
    return level


def _rows(matrix: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Rows of `[..., n, n]` by their numbers `[..., tokens, 1]`: `[..., tokens, n]`."""
    first = torch.arange(0, matrix[..., 0].numel(), matrix.shape[-1], device=at.device).view(*matrix.shape[:-2], 1)
    return torch.nn.functional.embedding(first + at.squeeze(-1), matrix.flatten(0, -2))
