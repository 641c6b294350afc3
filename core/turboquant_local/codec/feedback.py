"""Codes chosen one coordinate after the other, each making up for the errors before it.

Rounding every coordinate to its nearest level makes |x - x̂|^2 least. What attention feels is the error of q . x,
whose expected square is (x - x̂)' H (x - x̂) with H the second moments of the queries. Where H is not a multiple of the
identity, a coordinate can be rounded so that its error cancels part of the errors made before it. This is the rounding
of GPTQ and LDLQ (arXiv 2210.17323, 2307.13304) applied to keys instead of weights. Storage and reading stay the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Nearest = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From coordinates to the codes (int32) and the levels nearest to them, all of one shape."""

_PANEL = 16
"""Coordinates between two matrix products; inside a panel errors are passed on one by one."""


def feedback_codes(
    y: torch.Tensor, nearest: Nearest, weights: torch.Tensor, rotation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of vectors that make the weighted error small.

    Args:
        y: `[..., tokens, head_dim]` float32, rotated vectors in the unit of the levels.
        nearest: The codebook.
        weights: `[..., 1, head_dim]`, above 0: what an error counts in each channel before the rotation.
        rotation: `[head_dim, head_dim]` float32, Π of `y = Π x`.

    Returns:
        Codes, int32, and their levels, float32, both `[..., tokens, head_dim]`.
    """
    passed_on = -_error_factor(weights, rotation).mT
    targets = y.mT.contiguous()  # one coordinate of all tokens is then one stretch of memory
    errors = torch.empty_like(targets)
    for start in range(0, targets.shape[-2], _PANEL):
        stop = min(start + _PANEL, targets.shape[-2])
        targets[..., start:stop, :] += passed_on[..., start:stop, :start] @ errors[..., :start, :]
        for i in range(start, stop):
            target = targets[..., i, :]
            error = target - nearest(target)[1]
            errors[..., i, :] = error
            targets[..., i + 1 : stop, :].addcmul_(passed_on[..., i + 1 : stop, i, None], error.unsqueeze(-2))
    codes, levels = nearest(targets)
    return codes.mT.contiguous(), levels.mT.contiguous()


def _error_factor(weights: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """`[..., head_dim, head_dim]`: what coordinate i's error adds to the target of coordinate j > i, negated.

    With H = Π diag(w) Π' and the upper Cholesky factor U of its inverse, this is U with rows divided by the diagonal.
    """
    inverse = (rotation / weights.float()) @ rotation.T
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper / upper.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
