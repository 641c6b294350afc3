"""Per-channel centering of keys, which softmax does not see."""

from __future__ import annotations

import torch


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
