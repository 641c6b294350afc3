"""What a model computes between its matrix products for one token, a launch each: norms, rotation, the window.

PyTorch takes eight launches for the one and ten for the other, and a launch on one token takes longer than its work.
Every rounding to the model's dtype is where the model itself rounds; so products and sums are not fused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_local.kernels.triton.devices import launch_early, unserved
from turboquant_local.kernels.triton.early import let_next_start, wait

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
    return _norm(x, None, weight, eps)[1]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual + x`, and the `rms_norm` of that."""
    return _norm(x, residual, weight, eps)


def _norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    size = x.shape[-1]
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    _rms_norm[(x.numel() // size,)](
        x, x if residual is None else residual.contiguous(), weight, total, out, eps,
        SIZE=size, PADDED=triton.next_power_of_2(size), RESIDUAL=residual is not None,
        num_warps=8 if size > 1024 else 1, enable_fp_fusion=False, **launch_early(x.device),
    )  # fmt: skip
    return total, out


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


def write_refusal(*tensors: torch.Tensor) -> str | None:
    """Why `write` does not serve these windows and states, or None."""
    windows = tensors[:2]
    if not all(x.is_contiguous() for x in windows) or any(x.stride(3) != 1 for x in tensors):
        return "strides: it takes contiguous windows, and vectors of unit stride"
    return next(filter(None, map(refusal, tensors)), None)


def write(to: torch.Tensor, other_to: torch.Tensor, slot: torch.Tensor, x: torch.Tensor, other: torch.Tensor) -> None:
    """Put a token's keys and its values into the windows, where `slot` says.

    Args:
        to: `[batch, num_kv_heads, tokens, head_dim]`, contiguous.
        other_to: The values', of the same shape but for head_dim.
        slot: int64 `[1]`.
        x: `[batch, num_kv_heads, 1, head_dim]`, of unit stride in the last dimension.
        other: Likewise.
    """
    batch, heads, tokens, size = to.shape
    other_size = other_to.shape[3]
    _write[(batch * heads,)](
        to, other_to, slot, x, other, x.stride(0), x.stride(1), other.stride(0), other.stride(1), tokens,
        HEADS=heads, SIZE=size, OTHER_SIZE=other_size, PADDED=triton.next_power_of_2(max(size, other_size)),
        num_warps=1, **launch_early(x.device),
    )  # fmt: skip


@triton.jit
def _rms_norm(
    x, residual, weight, total, out, eps,
    SIZE: tl.constexpr, PADDED: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    row = tl.program_id(0).to(tl.int64) * SIZE
    at = tl.arange(0, PADDED)
    w = tl.load(weight + at, mask=at < SIZE, other=0.0)
    wait(EARLY)
    value = tl.load(x + row + at, mask=at < SIZE, other=0.0)
    if RESIDUAL:
        before = tl.load(residual + row + at, mask=at < SIZE, other=0.0)
        value = (before.to(tl.float32) + value.to(tl.float32)).to(value.dtype)
        tl.store(total + row + at, value, mask=at < SIZE)
    exact = value.to(tl.float32)
    mean = tl.sum(exact * exact, 0) / SIZE
    rounded = (exact * tl.rsqrt(mean + eps)).to(value.dtype)
    tl.store(out + row + at, (rounded.to(tl.float32) * w.to(tl.float32)).to(value.dtype), mask=at < SIZE)


@triton.jit
def _write(
    to, other_to, slot, x, other, stride_b, stride_h, other_stride_b, other_stride_h, tokens,
    HEADS: tl.constexpr, SIZE: tl.constexpr, OTHER_SIZE: tl.constexpr, PADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    pair = tl.program_id(0).to(tl.int64)
    row = pair * tokens + tl.load(slot)
    batch = pair // HEADS
    head = pair % HEADS
    at = tl.arange(0, PADDED)
    wait(EARLY)
    a = tl.load(x + batch * stride_b + head * stride_h + at, mask=at < SIZE)
    b = tl.load(other + batch * other_stride_b + head * other_stride_h + at, mask=at < OTHER_SIZE)
    tl.store(to + row * SIZE + at, a, mask=at < SIZE)
    tl.store(other_to + row * OTHER_SIZE + at, b, mask=at < OTHER_SIZE)


@triton.jit
def _rotary(
    q, k, cos, sin, out, q_stride, k_stride,
    Q_HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    wait(EARLY)
    head = tl.program_id(0)
    at = tl.arange(0, PADDED)
    valid = at < HALF
    x = q + head * q_stride
    if head >= Q_HEADS:
        x = k + (head - Q_HEADS) * k_stride
    low = tl.load(x + at, mask=valid, other=0.0)
    high = tl.load(x + HALF + at, mask=valid, other=0.0)
    to = out + head * (2 * HALF) + at
    tl.store(to, turned(low, high, -1.0, cos + at, sin + at, valid), mask=valid)
    tl.store(to + HALF, turned(high, low, 1.0, cos + HALF + at, sin + HALF + at, valid), mask=valid)


@triton.jit
def turned(a, b, sign, cos, sin, valid):
    """One channel of each pair, from itself and the other, rounded where PyTorch's operations round."""
    first = a.to(tl.float32) * tl.load(cos, mask=valid, other=0.0).to(tl.float32)
    second = sign * b.to(tl.float32) * tl.load(sin, mask=valid, other=0.0).to(tl.float32)
    return (first.to(a.dtype).to(tl.float32) + second.to(a.dtype).to(tl.float32)).to(a.dtype)
