"""What a sample of a head's vectors says about all of them: the mean to take off, and which channels matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from turboquant_local.codec.scales import rounded_scales

_FLOOR, _CEILING = 0.1, 4.0
"""Bounds of a channel's weight, the mean weight being 1: a small sample must not silence or crown a channel."""


@dataclass(frozen=True)
class HeadStatistics:
    """Taken once, of the first tokens behind the sinks, and kept as long as more tokens may be packed.

    Attributes:
        mean: `[batch, num_kv_heads, 1, head_dim]`, subtracted from every vector before it is quantised, or None.
        weights: `[batch, num_kv_heads, 1, head_dim]`, see `channel_weights`, or None.
        scale_unit: `[batch, num_kv_heads, 1]` float32, the unit of 8-bit scales, or None.
    """

    mean: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    scale_unit: torch.Tensor | None = None

    @property
    def fields(self) -> tuple[torch.Tensor | None, ...]:
        """All of them, in the order above."""
        return self.mean, self.weights, self.scale_unit

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> HeadStatistics:
        """A function applied to those there are."""
        return HeadStatistics(*(None if x is None else function(x) for x in self.fields))

    @staticmethod
    def stacked(parts: Sequence[HeadStatistics]) -> HeadStatistics:
        """Those of several batches, one behind the other."""
        if len(parts) == 1:
            return parts[0]
        fields = zip(*(part.fields for part in parts), strict=True)
        return HeadStatistics(*(None if xs[0] is None else torch.cat(xs) for xs in fields))

    def split(self, count: int) -> list[HeadStatistics]:
        """So many equal parts of the batch, as views."""
        parts = ([None] * count if x is None else x.chunk(count) for x in self.fields)
        return [HeadStatistics(*own) for own in zip(*parts, strict=True)]


def head_statistics(x: torch.Tensor, *, center: bool, weigh: bool, unit: bool) -> HeadStatistics:
    """Take those statistics that are asked for.

    Args:
        x: `[batch, num_kv_heads, tokens, head_dim]`, a sample of keys or values.
        center: Take the mean.
        weigh: Take the weights of channels.
        unit: Take the unit of scales.
    """
    mean = key_mean(x) if center else None
    centred = x if mean is None else x.float() - mean.float()
    return HeadStatistics(mean, channel_weights(x) if weigh else None, typical_norm(centred) if unit else None)


def typical_norm(x: torch.Tensor) -> torch.Tensor:
    """The root mean square of the norms, as a rounded scale; where all are 0, that of a standard normal vector.

    A sample may be padding but for its last few tokens, whose keys are nearly the same and vanish once their mean is
    off. A single other token among 128 still brings this to a tenth of its own norm.

    Args:
        x: `[batch, num_kv_heads, tokens, head_dim]`.

    Returns:
        `[batch, num_kv_heads, 1]` float32.
    """
    norm = x.float().square().sum(-1).mean(-1, keepdim=True).sqrt()
    return rounded_scales(torch.where(norm > 0, norm, x.shape[-1] ** 0.5))


def key_mean(keys: torch.Tensor) -> torch.Tensor:
    """The vector to subtract from every key of a head before quantising.

    A key's bias is a constant of its channel and takes up the code's range; subtracting one vector from all keys
    shifts all scores of a query alike, so attention stays the same. A sample's mean also carries noise, and rotary
    channels whose mean wanders. Each channel's mean m is therefore taken as far as it outweighs the channel's spread:
    m * m^2 / (m^2 + variance), which is m for a strong bias and 0 for none.

    Args:
        keys: `[batch, num_kv_heads, tokens, head_dim]`, a sample of the keys.

    Returns:
        `[batch, num_kv_heads, 1, head_dim]` in the dtype of the keys.
    """
    variance, mean = torch.var_mean(keys.float(), dim=2, correction=0, keepdim=True)
    energy = mean.square()
    share = energy / (energy + variance).clamp_min(torch.finfo(torch.float32).tiny)
    return (mean * share).to(keys.dtype)


def channel_weights(keys: torch.Tensor) -> torch.Tensor:
    """How much an error in each channel of a key counts: the expected square of a query there, mean 1.

    Queries are not at hand when keys are packed, but a trained model gives both the same profile: scaling a channel of
    all keys up and of all queries down changes nothing but the norms of the two projections, and training with weight
    decay ends where these are equal. So the variance of the keys stands for the squares of the queries. It is the same
    for the two channels of a rotary pair (i, i + head_dim / 2), which trade places as positions go on.

    Args:
        keys: `[batch, num_kv_heads, tokens, head_dim]`, a sample of the keys; head_dim is even.

    Returns:
        `[batch, num_kv_heads, 1, head_dim]` in the dtype of the keys.
    """
    variance = keys.float().var(dim=2, correction=0, keepdim=True)
    pairs = variance.unflatten(-1, (2, -1)).mean(-2)
    mean = pairs.mean(-1, keepdim=True)
    weights = (pairs / mean.clamp_min(torch.finfo(torch.float32).tiny)).clamp(max=_CEILING) + _FLOOR
    return torch.cat([weights, weights], -1).to(keys.dtype)
