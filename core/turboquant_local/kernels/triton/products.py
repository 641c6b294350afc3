"""Products of a model's weights with one token: its projections by one launch, the first half of a gated MLP by one.

Reading the weights is all the time such a product takes. So a program loads the first of its weights before it waits
for the kernel before it, whose result it needs only then (programmatic dependent launch, Hopper and later).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from turboquant_local.kernels.triton.devices import launch_early
from turboquant_local.kernels.triton.early import let_next_start, wait
from turboquant_local.kernels.triton.step import refusal

__all__ = ["ACTIVATIONS", "gated", "linear", "refusal"]

MOST = 3
"""Projections a launch serves."""
ACTIVATIONS = ("silu", "gelu_tanh")
ROWS = 4


def linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Projections of one token, summed in float32.

    Args:
        x: `[..., in_features]`, one token.
        weights: `[out_features, in_features]` of each projection, contiguous, of x's dtype; up to 3.
        biases: `[out_features]` of each, or None for all.
        residual: `[..., out_features]`, added to what a single projection gives, rounded to x's dtype in between.
    """
    sizes = [weight.shape[0] for weight in weights]
    out = torch.empty(sum(sizes), dtype=x.dtype, device=x.device)
    _launch(x, weights, biases, residual, out, None)
    return tuple(part.view(*x.shape[:-1], -1) for part in out.split(sizes))


def gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """`activation(gate @ x) * (up @ x)` for one token, rounded to x's dtype where a model rounds.

    Args:
        x: `[..., in_features]`, one token.
        gate: `[out_features, in_features]`, contiguous, of x's dtype.
        up: Likewise.
        activation: One of `ACTIVATIONS`.
    """
    out = torch.empty(gate.shape[0], dtype=x.dtype, device=x.device)
    _launch(x, [gate, up], [None, None], None, out, activation)
    return out.view(*x.shape[:-1], -1)


def _launch(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    residual: torch.Tensor | None,
    out: torch.Tensor,
    activation: str | None,
) -> None:
    x = x.contiguous()
    size = x.shape[-1]
    columns, warps = (2048, 8) if 1024 < size <= 8192 else (512, 4)  # measured in benchmarks/NOTES.md
    outputs = [weight.shape[0] for weight in weights]
    rows = ROWS if activation is None else ROWS // 2
    programs = sum(triton.cdiv(n, rows) for n in (outputs if activation is None else outputs[:1]))
    missing = MOST - len(weights)
    _products[(programs,)](
        x, *weights, *[x] * missing, *(x if bias is None else bias for bias in biases), *[x] * missing,
        x if residual is None else residual.contiguous(), out, *outputs, *[0] * missing,
        SIZE=size, BIAS=biases[0] is not None, RESIDUAL=residual is not None, ACTIVATION=activation,
        ROWS=rows, COLUMNS=columns, num_warps=warps, **launch_early(x.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=("n0", "n1", "n2"))
def _products(
    x, w0, w1, w2, b0, b1, b2, residual, out, n0, n1, n2,
    SIZE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some rows of one of the matrices; with ACTIVATION, of the first two."""
    let_next_start(EARLY)
    program = tl.program_id(0)
    if ACTIVATION is not None:
        _gated_rows(x, w0, w1, out, program * ROWS, n0, SIZE, ACTIVATION, ROWS, COLUMNS, EARLY)
    else:
        w = w0
        b = b0
        n = n0
        if program >= tl.cdiv(n0, ROWS):
            program -= tl.cdiv(n0, ROWS)
            out += n0
            w = w1
            b = b1
            n = n1
            if program >= tl.cdiv(n1, ROWS):
                program -= tl.cdiv(n1, ROWS)
                out += n1
                w = w2
                b = b2
                n = n2
        _rows(x, w, b, residual, out, program * ROWS, n, SIZE, BIAS, RESIDUAL, ROWS, COLUMNS, EARLY)


@triton.jit
def _rows(
    x, w, b, residual, out, first, n,
    SIZE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    valid = row < n
    w += row.to(tl.int64)[:, None] * SIZE + column[None, :]
    tile = _load(w, valid, column, 0, SIZE, COLUMNS)
    bias = tl.load(b + row, mask=valid, other=0.0).to(tl.float32) if BIAS else 0.0
    wait(EARLY)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, SIZE, COLUMNS):
        following = _load(w, valid, column, start + COLUMNS, SIZE, COLUMNS)
        total += tile.to(tl.float32) * _part(x, column + start, SIZE)[None, :]
        tile = following
    y = (tl.sum(total, 1) + bias).to(out.dtype.element_ty)
    if RESIDUAL:
        y = (y.to(tl.float32) + tl.load(residual + row, mask=valid, other=0.0).to(tl.float32)).to(y.dtype)
    tl.store(out + row, y, mask=valid)


@triton.jit
def _gated_rows(
    x, gate, up, out, first, n,
    SIZE: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    valid = row < n
    place = row.to(tl.int64)[:, None] * SIZE + column[None, :]
    gates = _load(gate + place, valid, column, 0, SIZE, COLUMNS)
    ups = _load(up + place, valid, column, 0, SIZE, COLUMNS)
    wait(EARLY)
    g = tl.zeros([ROWS, COLUMNS], tl.float32)
    u = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, SIZE, COLUMNS):
        next_gates = _load(gate + place, valid, column, start + COLUMNS, SIZE, COLUMNS)
        next_ups = _load(up + place, valid, column, start + COLUMNS, SIZE, COLUMNS)
        value = _part(x, column + start, SIZE)[None, :]
        g += gates.to(tl.float32) * value
        u += ups.to(tl.float32) * value
        gates = next_gates
        ups = next_ups
    dtype: tl.constexpr = out.dtype.element_ty
    opened = tl.sum(g, 1).to(dtype).to(tl.float32)
    exponent = opened
    if ACTIVATION == "gelu_tanh":  # by tanh(z) = 2 / (1 + exp(-2z)) - 1
        exponent *= 1.5957691216057308 * (1 + 0.044715 * opened * opened)
    opened = (opened / (1 + tl.exp(-exponent))).to(dtype).to(tl.float32)
    tl.store(out + row, (opened * tl.sum(u, 1).to(dtype).to(tl.float32)).to(dtype), mask=valid)


@triton.jit
def _load(w, valid, column, start, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Weights from column `start` on; each is read once."""
    inside = column < SIZE - start
    return tl.load(w + start, mask=valid[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _part(x, column, SIZE: tl.constexpr):
    return tl.load(x + column, mask=column < SIZE, other=0.0).to(tl.float32)
