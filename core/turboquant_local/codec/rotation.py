"""Random rotations: after one, every coordinate of a unit vector has the same known distribution.

The matrices are made on the CPU from Python's own generator, so that a seed gives the same rotation on every
device and with every version of torch.
"""

from __future__ import annotations

import random

import torch

from turboquant_local.codec.shared import shared
from turboquant_local.config import Rotation
from turboquant_local.errors import ConfigError


@shared
def rotation_matrix(head_dim: int, kind: Rotation = "auto", seed: int = 0) -> torch.Tensor:
    """An orthogonal matrix Π (paper, Algorithm 1, line 2); rows are the new axes, so `y = x @ Π.T`.

    Args:
        head_dim: Size of the vectors.
        kind: "hadamard": signs, Hadamard, signs, Hadamard (one round alone is weak on one-hot vectors, and a
            Hadamard without signs on vectors with an offset); "dense": uniform over all rotations; "auto":
            hadamard where it exists, else dense.
        seed: Seed of the signs or of the dense matrix.

    Returns:
        `[head_dim, head_dim]` float32 on the CPU, shared between callers: do not write to it.

    Raises:
        ConfigError: No Hadamard matrix of this size.
    """
    if head_dim < 1:
        raise ConfigError(f"head_dim={head_dim}: expected a positive integer")
    if kind == "auto":
        kind = "hadamard" if _has_hadamard(head_dim) else "dense"
    generator = random.Random(seed)
    if kind == "dense":
        return _dense(head_dim, generator).float()
    if not _has_hadamard(head_dim):
        raise ConfigError(f"head_dim={head_dim}: rotation='hadamard' needs 2^k or 3*2^k; use rotation='dense'")
    hadamard = _hadamard(head_dim) / head_dim**0.5
    matrix = torch.eye(head_dim, dtype=torch.float64)
    for _ in range(2):
        signs = torch.tensor([generator.choice((-1.0, 1.0)) for _ in range(head_dim)], dtype=torch.float64)
        matrix = hadamard @ (signs[:, None] * matrix)
    return matrix.float()


def _has_hadamard(size: int) -> bool:
    odd = size // (size & -size)
    return odd == 1 or (odd == 3 and size % 4 == 0)


def _hadamard(size: int) -> torch.Tensor:
    """Sylvester's doubling, from Paley's matrix of order 12 where the size is 3 * 2^k."""
    matrix = _paley12() if size % 3 == 0 else torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _paley12() -> torch.Tensor:
    """Paley's construction over the field of 11 elements."""
    squares = {i * i % 11 for i in range(1, 11)}
    matrix = torch.eye(12, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, -1.0
    for i in range(11):
        for j in range(11):
            if i != j:
                matrix[i + 1, j + 1] = 1.0 if (i - j) % 11 in squares else -1.0
    return matrix


def _dense(size: int, generator: random.Random) -> torch.Tensor:
    """QR of a Gaussian matrix, with the signs fixed so that the distribution is uniform (Haar)."""
    gaussian = torch.tensor([generator.gauss(0.0, 1.0) for _ in range(size * size)], dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian.view(size, size))
    signs: torch.Tensor = r.diagonal().sign()
    return torch.mul(q, signs).contiguous()
