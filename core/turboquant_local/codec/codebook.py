"""Lloyd-Max codebooks for one coordinate of a random unit vector."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from turboquant_local.codec.shared import shared
from turboquant_local.errors import ConfigError

_NODES = 48
"""Gauss-Legendre nodes a cell; the density is smooth, so the integrals are exact to rounding."""


@dataclass(frozen=True)
class Codebook:
    """The best scalar quantizer for a coordinate's distribution.

    Attributes:
        centroids: `[2**bits]` float64, increasing, symmetric about 0.
        boundaries: `[2**bits - 1]` float64, half-way between neighbours.
        mse: Expected squared error of a unit vector: head_dim times that of one coordinate.
    """

    centroids: torch.Tensor
    boundaries: torch.Tensor
    mse: float


@shared
def lloyd_max(head_dim: int, bits: int) -> Codebook:
    """Solve the k-means problem of the paper (Eq. 4) for the exact density of a coordinate (Lemma 1).

    The density on [-1, 1] is proportional to (1 - t^2)^((head_dim - 3) / 2). Newton's method on the condition
    "every centroid is the mean of its cell", started from the high-rate solution (point density ~ density^(1/3)).

    Args:
        head_dim: Size of the vectors, 4 or more.
        bits: 1 to 8.

    Raises:
        ConfigError: A head size or bit count outside the range.
    """
    if not 1 <= bits <= 8:
        raise ConfigError(f"bits={bits}: a codebook has 1 to 8 bits")
    if head_dim < 4:
        raise ConfigError(f"head_dim={head_dim}: a codebook needs 4 or more")
    centroids = _high_rate_start(head_dim, bits)
    for _ in range(100):
        mass, mean, _ = _cells(centroids, head_dim)
        residual = centroids - mean
        if residual.abs().max() < 1e-14:
            break
        edge = (centroids[1:] + centroids[:-1]) / 2
        slope = _density(edge, head_dim) / 2
        left = torch.diag_embed(slope * (edge - mean[:-1]) / mass[:-1])  # move of a mean with its upper edge
        right = torch.diag_embed(slope * (mean[1:] - edge) / mass[1:])  # and with its lower edge
        jacobian = torch.eye(len(centroids), dtype=torch.float64)
        jacobian[:-1, :-1] -= left
        jacobian[:-1, 1:] -= left
        jacobian[1:, :-1] -= right
        jacobian[1:, 1:] -= right
        centroids = centroids - torch.linalg.solve(jacobian, residual)
        centroids = (centroids - centroids.flip(0)) / 2
    return Codebook(centroids, (centroids[1:] + centroids[:-1]) / 2, float(_cells(centroids, head_dim)[2]))


def _density(t: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Lemma 1: the density of a coordinate of a point on the unit sphere."""
    log_norm = math.lgamma(head_dim / 2) - math.lgamma((head_dim - 1) / 2) - 0.5 * math.log(math.pi)
    return torch.exp(log_norm + (head_dim - 3) / 2 * torch.log1p(-t.square()))


def _cells(centroids: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mass and mean of every cell, and the vector's squared error."""
    reach = min(1.0, 14 / head_dim**0.5)  # beyond it the density is below 1e-40
    inner = (centroids[1:] + centroids[:-1]) / 2
    edges = torch.cat([inner.new_tensor([-reach]), inner, inner.new_tensor([reach])])
    nodes, weights = _gauss_legendre()
    half = (edges[1:] - edges[:-1])[:, None] / 2
    t = edges[:-1, None] + half * (nodes + 1)  # [cells, nodes]
    w = half * weights * _density(t, head_dim)
    mass = w.sum(1)
    return mass, (w * t).sum(1) / mass, head_dim * (w * (t - centroids[:, None]).square()).sum()


@shared
def _gauss_legendre() -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights on [-1, 1] (Golub and Welsch)."""
    k = torch.arange(1, _NODES, dtype=torch.float64)
    beta = k / (4 * k.square() - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return nodes, 2 * vectors[0].square()


def _high_rate_start(head_dim: int, bits: int) -> torch.Tensor:
    grid = torch.linspace(-1, 1, 20001, dtype=torch.float64)[1:-1] * min(1.0, 10 / head_dim**0.5)
    cumulative = _density(grid, head_dim).pow(1 / 3).cumsum(0)
    targets = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits * cumulative[-1]
    start = grid[torch.searchsorted(cumulative, targets).clamp(max=len(grid) - 1)]
    symmetric: torch.Tensor = (start - start.flip(0)) / 2
    return symmetric
