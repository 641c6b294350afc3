"""What a model computes between its matrix products for one token, a launch each: root mean square norm, rotation.

PyTorch takes eight launches for the one and ten for the other, and a launch on one token takes longer than its work.
Every rounding to the model's dtype is where the model itself rounds; so products and sums are not fused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboquant_local.kernels.triton.devices import launch_early, unserved

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refusal(x: torch.Tensor) -> str | None:
    """Why a tensor is not served, or None."""
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}: it serves {', '.join(map(str, DTYPES))}"
    return unserved(x.device)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * round(x / rms(x))`, computed in float32 but for the rounding to x's dtype.

    Args:
        x: `[..., size]`.
        weight: `[size]`.
        eps: Added to the mean square.
    """
    x = x.contiguous()
    size = x.shape[-1]
    out = torch.empty_like(x)
    _rms_norm[(x.numel() // size,)](
        x, weight, out, eps, SIZE=size, PADDED=triton.next_power_of_2(size), num_warps=8 if size > 1024 else 1,
        enable_fp_fusion=False, **launch_early(x.device),
    )  # fmt: skip
    return out


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding of one token; channels i and i + head_dim / 2 are a pair.

    Args:
        q: `[1, num_q_heads, 1, head_dim]`, of unit stride in the last dimension.
        k: `[1, num_kv_heads, 1, head_dim]`, likewise.
        cos: `[1, 1, head_dim]`, contiguous.
        sin: Likewise.
    """
    q_heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[3]
    out = torch.empty(1, q_heads + kv_heads, 1, size, dtype=q.dtype, device=q.device)
    _rotary[(q_heads + kv_heads,)](
        q, k, cos, sin, out, q.stride(1), k.stride(1),
        Q_HEADS=q_heads, HALF=size // 2, PADDED=triton.next_power_of_2(size // 2), num_warps=1, enable_fp_fusion=False,
        **launch_early(q.device),
    )  # fmt: skip
    rotated_q, rotated_k = out.split([q_heads, kv_heads], dim=1)
    return rotated_q, rotated_k


@triton.jit
def _rms_norm(x, weight, out, eps, SIZE: tl.constexpr, PADDED: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * SIZE
    at = tl.arange(0, PADDED)
    w = tl.load(weight + at, mask=at < SIZE, other=0.0)
    if EARLY:
        gdc_wait()
    value = tl.load(x + row + at, mask=at < SIZE, other=0.0)
    exact = value.to(tl.float32)
    mean = tl.sum(exact * exact, 0) / SIZE
    rounded = (exact * tl.rsqrt(mean + eps)).to(value.dtype)
    tl.store(out + row + at, (rounded.to(tl.float32) * w.to(tl.float32)).to(value.dtype), mask=at < SIZE)


@triton.jit
def _rotary(
    q, k, cos, sin, out, q_stride, k_stride,
    Q_HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    at = tl.arange(0, PADDED)
    valid = at < HALF
    x = q + head * q_stride
    if head >= Q_HEADS:
        x = k + (head - Q_HEADS) * k_stride
    low = tl.load(x + at, mask=valid, other=0.0)
    high = tl.load(x + HALF + at, mask=valid, other=0.0)
    to = out + head * (2 * HALF) + at
    tl.store(to, _sum(low, high, -1.0, cos + at, sin + at, valid), mask=valid)
    tl.store(to + HALF, _sum(high, low, 1.0, cos + HALF + at, sin + HALF + at, valid), mask=valid)


@triton.jit
def _sum(a, b, sign, cos, sin, valid):
    first = a.to(tl.float32) * tl.load(cos, mask=valid, other=0.0).to(tl.float32)
    second = sign * b.to(tl.float32) * tl.load(sin, mask=valid, other=0.0).to(tl.float32)
    return (first.to(a.dtype).to(tl.float32) + second.to(a.dtype).to(tl.float32)).to(a.dtype)
