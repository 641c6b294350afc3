"""Attention of one token over 16-bit keys and values, split over the tokens: a baseline that uses the memory well."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LOG2E = 1.4426950408889634


@triton.jit
def _partials(
    q, k, v, out, lse, tokens, split, factor, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr
):
    """One share of the tokens of one KV head, all its queries at once."""
    pair = tl.program_id(0).to(tl.int64)
    share = tl.program_id(1)
    row, d, n = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BN)
    query = tl.load(q + (pair * GROUP + row)[:, None] * D + d[None, :], mask=(row < GROUP)[:, None], other=0.0)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for start in tl.range(share * split, tl.minimum(share * split + split, tokens), BN):
        at = (pair * tokens + start + n)[:, None] * D + d[None, :]
        inside = start + n < tokens
        s = tl.dot(query, tl.load(k + at, mask=inside[:, None], other=0.0).T) * factor
        s = tl.where(inside[None, :], s, -1e30)
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        decay = tl.exp2(top - new)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(k.dtype.element_ty), tl.load(v + at, mask=inside[:, None], other=0.0), acc * decay[:, None])
        top = new
    at = (pair * GROUP + row) * tl.num_programs(1) + share
    tl.store(out + at[:, None] * D + d[None, :], acc / total[:, None], mask=(row < GROUP)[:, None])
    tl.store(lse + at, top + tl.log2(total), mask=row < GROUP)


@triton.jit
def _combine(out, lse, result, shares, SHARES: tl.constexpr, D: tl.constexpr):
    row, d, i = tl.program_id(0).to(tl.int64), tl.arange(0, D), tl.arange(0, SHARES)
    part = tl.load(lse + row * shares + i, mask=i < shares, other=-float("inf"))
    weight = tl.exp2(part - tl.max(part, 0))
    x = tl.load(out + (row * shares + i)[:, None] * D + d[None, :], mask=(i < shares)[:, None], other=0.0)
    x = tl.sum(x * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(result + row * D + d, x.to(result.dtype.element_ty))


def split_kv_attention(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, waves: int = 4) -> torch.Tensor:
    """Attend with one query token.

    Args:
        query: `[batch, num_q_heads, 1, head_dim]`, contiguous, bfloat16 or float16.
        k: `[batch, num_kv_heads, tokens, head_dim]`, contiguous.
        v: Likewise.
        waves: Programs wanted for every multiprocessor.
    """
    batch, heads, tokens, head_dim = k.shape
    group = query.shape[1] // heads
    block = 64
    wanted = max(1, waves * torch.cuda.get_device_properties(query.device).multi_processor_count // (batch * heads))
    split = triton.cdiv(triton.cdiv(tokens, block), wanted) * block
    shares = triton.cdiv(tokens, split)
    rows = query.shape[0] * query.shape[1]
    out = torch.empty(rows, shares, head_dim, device=query.device)
    lse = torch.empty(rows, shares, device=query.device)
    result = torch.empty_like(query)
    _partials[(batch * heads, shares)](
        query, k, v, out, lse, tokens, split, head_dim**-0.5 * _LOG2E,
        GROUP=group, ROWS=16, D=head_dim, BN=block, num_warps=4, num_stages=3,
    )  # fmt: skip
    _combine[(rows,)](out, lse, result, shares, SHARES=triton.next_power_of_2(shares), D=head_dim)
    return result
