"""Tile scaling in the manner of KVarN (arXiv 2606.03458): even out the variance of a tile's tokens and channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turboquant_local.codec import lloyd_max, rotation_matrix

_ROUNDS = 8


@dataclass(frozen=True)
class TileScaling:
    """Rotate; scale rows and columns of a tile in turn until all have unit variance (Sinkhorn); Lloyd-Max codes.

    Attributes:
        bits: Bits a coordinate.
        block_length: Tokens of a tile.
    """

    bits: int
    block_length: int = 128

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors after a round trip; the scales have 16 bits."""
        head_dim = x.shape[-1]
        rotation: torch.Tensor = rotation_matrix(head_dim).to(x.device)
        tiles = (x @ rotation.T).unflatten(2, (-1, self.block_length))  # [batch, heads, tiles, tokens, head_dim]
        token_scale, channel_scale = torch.ones_like(tiles[..., :1]), torch.ones_like(tiles[..., :1, :])
        for _ in range(_ROUNDS):
            channel_scale = _root_mean_square(tiles / token_scale, dim=-2)
            token_scale = _root_mean_square(tiles / channel_scale, dim=-1)
        scale = token_scale.half().float() * channel_scale.half().float()
        codebook = lloyd_max(head_dim, self.bits)
        centroids = (codebook.centroids * head_dim**0.5).float().to(x.device)
        boundaries = (codebook.boundaries * head_dim**0.5).float().to(x.device)
        levels = centroids[torch.bucketize(tiles / scale, boundaries)]
        return torch.matmul((levels * scale).flatten(2, 3), rotation)

    def bits_per_coordinate(self, head_dim: int) -> float:
        """A code, a scale a token and a scale a channel of a tile."""
        return self.bits + 16 / head_dim + 16 / self.block_length

    def constant_bytes(self, head_dim: int) -> int:
        """The rotation; the codebook is a few numbers."""
        return rotation_matrix(head_dim).nbytes


def _root_mean_square(x: torch.Tensor, dim: int) -> torch.Tensor:
    result: torch.Tensor = x.square().mean(dim, keepdim=True).sqrt().clamp_min(1e-4)
    return result
