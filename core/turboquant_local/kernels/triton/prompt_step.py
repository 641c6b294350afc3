"""What a model computes between its matrix products for many tokens, in one pass over memory: rotation, gated SiLU.

PyTorch reads and writes the tensors of a long prompt once for every small operation. Every rounding to the model's
dtype is where the model itself rounds; so products and sums are not fused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_local.kernels.triton.step import refusal, rms_norm, turned

__all__ = ["merge", "refusal", "rms_norm", "rotary", "swiglu"]


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding; channels i and i + head_dim / 2 are a pair.

    Args:
        q: `[1, num_q_heads, tokens, head_dim]`, of unit stride in the last dimension.
        k: `[1, num_kv_heads, tokens, head_dim]`, likewise.
        cos: `[1, tokens, head_dim]`, contiguous.
        sin: Likewise.

    Returns:
        New tensors, laid out in memory as `q` and `k` are.
    """
    heads, tokens, size = q.shape[1:]
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    _rotary[(triton.cdiv(tokens, _TOKENS), heads + k.shape[1])](
        q, k, cos, sin, q_out, k_out, tokens, *(stride for x in (q, k, q_out, k_out) for stride in x.stride()[1:3]),
        Q_HEADS=heads, HALF=size // 2, PADDED=triton.next_power_of_2(size // 2), BT=_TOKENS,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return q_out, k_out


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, written over `gate`; both contiguous and of one shape."""
    count = gate.numel()
    _swiglu[(triton.cdiv(count, _ENTRIES),)](gate, up, count, BE=_ENTRIES, num_warps=4, enable_fp_fusion=False)
    return gate


def merge(first: torch.Tensor, first_lse: torch.Tensor, second: torch.Tensor, second_lse: torch.Tensor) -> torch.Tensor:
    """See `kernels.api.merge`; all on a device that `devices.unserved` does not refuse."""
    heads, tokens, size = first.shape[1:]
    out = torch.empty_like(first)
    _merge[(triton.cdiv(tokens, _TOKENS), heads, first.shape[0])](
        first, first_lse.contiguous(), second, second_lse.contiguous(), out, tokens,
        *first.stride()[:3], *second.stride()[:3], *out.stride()[:3],
        SIZE=size, PADDED=triton.next_power_of_2(size), BT=_TOKENS, num_warps=4,
    )  # fmt: skip
    return out


_TOKENS = 32
_ENTRIES = 2048


@triton.jit(do_not_specialize=["tokens"])
def _rotary(
    q, k, cos, sin, q_out, k_out, tokens, q_head, q_token, k_head, k_token, q_out_head, q_out_token, k_out_head,
    k_out_token, Q_HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    head = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, PADDED)[None, :]
    valid = (at < HALF) & (token < tokens)
    if head < Q_HEADS:
        source = q + head * q_head + token * q_token + at
        to = q_out + head * q_out_head + token * q_out_token + at
    else:
        source = k + (head - Q_HEADS) * k_head + token * k_token + at
        to = k_out + (head - Q_HEADS) * k_out_head + token * k_out_token + at
    low = tl.load(source, mask=valid, other=0.0)
    high = tl.load(source + HALF, mask=valid, other=0.0)
    angle = token * (2 * HALF) + at
    tl.store(to, turned(low, high, -1.0, cos + angle, sin + angle, valid), mask=valid)
    tl.store(to + HALF, turned(high, low, 1.0, cos + HALF + angle, sin + HALF + angle, valid), mask=valid)


@triton.jit
def _swiglu(gate, up, count, BE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    valid = at < count
    x = tl.load(gate + at, mask=valid, other=0.0)
    y = tl.load(up + at, mask=valid, other=0.0)
    exact = x.to(tl.float32)
    rounded = (exact / (1 + tl.exp(-exact))).to(x.dtype)
    tl.store(gate + at, (rounded.to(tl.float32) * y.to(tl.float32)).to(x.dtype), mask=valid)


@triton.jit(do_not_specialize=["tokens"])
def _merge(
    first, first_lse, second, second_lse, out, tokens,
    first_batch, first_head, first_token, second_batch, second_head, second_token, out_batch, out_head, out_token,
    SIZE: tl.constexpr, PADDED: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    at = tl.arange(0, PADDED)[None, :]
    valid = (at < SIZE) & (token < tokens)[:, None]
    sums = (batch * tl.num_programs(1) + head) * tokens + token
    one = tl.load(first_lse + sums, mask=token < tokens, other=0.0)
    two = tl.load(second_lse + sums, mask=token < tokens, other=0.0)
    share = (1 / (1 + tl.exp(two - one)))[:, None]
    x = tl.load(first + batch * first_batch + head * first_head + token[:, None] * first_token + at, mask=valid)
    y = tl.load(second + batch * second_batch + head * second_head + token[:, None] * second_token + at, mask=valid)
    sum = share * x.to(tl.float32) + (1 - share) * y.to(tl.float32)
    tl.store(out + batch * out_batch + head * out_head + token[:, None] * out_token + at, sum.to(x.dtype), mask=valid)
