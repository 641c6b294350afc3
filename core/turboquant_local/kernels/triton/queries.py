"""Device code of decode attention around the tokens: rotate the queries before, merge the shares and rotate back after.

The rotation comes as a sum of TERMS matrices in the type of the products: of bfloat16 one where that is exact (a
Hadamard rotation), else two.
"""

import triton
import triton.language as tl

from turboquant_local.kernels.triton.softmax import INFINITY, LOG2E
from turboquant_local.kernels.triton.tiles import value_channels

QUERY_LIFT = tl.constexpr(64.0)
"""Rotated queries of norm 1 are held as so many times themselves: well inside float16 on both sides."""


@triton.jit
def _product(a, b, acc, TERMS: tl.constexpr):
    """Add `a @ b`, with b in float32 rounded to two terms of a's type if that is a 16-bit one."""
    high = b.to(a.dtype)
    acc = tl.dot(a, high, acc=acc, input_precision="ieee")
    if TERMS > 1 and a.dtype != tl.float32:
        acc = tl.dot(a, (b - high.to(tl.float32)).to(a.dtype), acc=acc, input_precision="ieee")
    return acc


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def rotated(
    q, rotation, mean, row, valid, channels, D: tl.constexpr, DP: tl.constexpr,
    MEAN: tl.constexpr, TERMS: tl.constexpr, Q_TERMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Queries in the space of the codes.

    Args:
        q: `[rows, D]`.
        rotation: `[TERMS, D, D]`.
        mean: `[D]`, the mean that was taken off the keys, or anything without MEAN.
        row: Which queries, `[ROWS]`.
        valid: Which of them there are.
        channels: Which coordinates, `[DP]`; D for padding.
        D: Size of a head.
        DP: The next power of 2.
        MEAN: Whether there is one.
        TERMS: Terms of the rotation.
        Q_TERMS: Terms in which a query is exact enough.
        COLUMNS: Coordinates of the query taken at once.

    Returns:
        `[DP, ROWS]` float32, every query divided by its norm, the norms, and the queries' products with the mean.
    """
    square = tl.zeros([row.shape[0]], tl.float32)
    along = tl.zeros([row.shape[0]], tl.float32)
    x = tl.zeros([DP, row.shape[0]], tl.float32)
    for start in tl.static_range(0, DP, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        matrix = rotation + channels[:, None] * D + k[None, :]
        inside = (channels < D)[:, None] & (k < D)[None, :]
        first = tl.load(matrix, mask=inside, other=0.0)
        part = tl.load(q + row[None, :] * D + k[:, None], mask=valid[None, :] & (k < D)[:, None], other=0.0)
        middle = tl.load(mean + k, mask=(k < D) & MEAN, other=0.0)  # before anything waits
        part = part.to(tl.float32)
        x = _product(first, part, x, Q_TERMS)
        if TERMS > 1:
            x = _product(tl.load(matrix + D * D, mask=inside, other=0.0), part, x, 1)
        if MEAN:
            more, further = tl.reduce((part * part, part * middle.to(tl.float32)[:, None]), 0, _add_both)  # waits once
            along += further
        else:
            more = tl.sum(part * part, 0)
        square += more
    norm = tl.maximum(tl.sqrt(square), 1e-30)
    return x * (1 / norm)[None, :], norm, along


@triton.jit
def _block(rotation, start, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS columns of the rotation, from `start` on, as rows; its rows in the order of values' codes."""
    c = start + tl.arange(0, COLUMNS)
    channels = value_channels(tl.arange(0, DP), D, DP, BITS)
    both = (c < D)[:, None] & (channels < D)[None, :]
    return tl.load(rotation + channels[None, :] * D + c[:, None], mask=both, other=0.0)


@triton.jit
def merge(
    out, lse, sink_logits, rotation, result, shares, first_row, first_head, present,
    D: tl.constexpr, DP: tl.constexpr, NR: tl.constexpr, BITS: tl.constexpr, Q_LENGTH: tl.constexpr,
    SINK: tl.constexpr, TERMS: tl.constexpr, SHARES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge the shares of some queries, and rotate what came from codes back.

    Args:
        out: `[shares, DP, NR]`, as `decode_kernels.attend` leaves it.
        lse: `[shares, NR]`.
        sink_logits: `[q_heads]`, or anything where SINK is false.
        rotation: `[TERMS, D, D]`, or anything where BITS is 16.
        result: Out, `[rows, D]`.
        shares: Shares of the work.
        first_row: The first query; the others follow.
        first_head: Its number among the heads times Q_LENGTH plus its own among the query tokens.
        present: How many queries there are, of NR.
        D: Size of a value.
        DP: The next power of 2.
        NR: Queries, and room for some.
        BITS: Of the values whose order `out` has.
        Q_LENGTH: Query tokens.
        SINK: Whether there are sink logits.
        TERMS: Terms of the rotation.
        SHARES: Shares read at once.
        COLUMNS: Coordinates of the result made at once; all with 16 bits.
    """
    r = tl.arange(0, NR)
    entry = tl.arange(0, DP * NR)
    there = (value_channels(entry // NR, D, DP, BITS) < D) & (entry % NR < present)
    i = tl.arange(0, SHARES)
    top = tl.full([NR], -INFINITY, tl.float32)
    mass = tl.full([NR], 0.0, tl.float32)
    if SINK:
        top = tl.load(sink_logits + (first_head + tl.minimum(r, present - 1)) // Q_LENGTH).to(tl.float32) * LOG2E
        mass += 1.0
    coded = tl.zeros([DP * NR], tl.float32)
    plain = tl.load(lse + r, mask=r < present, other=-INFINITY, cache_modifier=".cg")
    for start in range(0, shares, SHARES):
        share = start + i
        known = ((share > 0) & (share < shares))[:, None] & there[None, :]
        x = tl.load(out + share[:, None] * (DP * NR) + entry[None, :], mask=known, other=0.0, cache_modifier=".cg")
        have = (share < shares)[:, None] & (r < present)[None, :]
        part = tl.load(lse + share[:, None] * NR + r[None, :], mask=have, other=-INFINITY, cache_modifier=".cg")
        new = tl.maximum(top, tl.max(part, 0))
        base = tl.where(new == -INFINITY, 0.0, new)
        decay = tl.exp2(top - base)
        weight = tl.exp2(part - base[None, :])
        mass = mass * decay + tl.sum(weight, 0)
        every = tl.reshape(tl.broadcast_to(weight[:, None, :], [SHARES, DP, NR]), [SHARES, DP * NR])
        coded = coded * tl.reshape(tl.broadcast_to(decay[None, :], [DP, NR]), [DP * NR]) + tl.sum(every * x, 0)
        top = new
    inverse = 1 / tl.where(mass > 0, mass, 1.0)
    plain = (tl.exp2(plain - tl.where(top == -INFINITY, 0.0, top)) * inverse)[None, :]
    coded = tl.reshape(coded * tl.reshape(tl.broadcast_to(inverse[None, :], [DP, NR]), [DP * NR]), [DP, NR])
    for start in tl.static_range(0, DP, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        inside = (c < D)[:, None] & (r < present)[None, :]
        x = tl.load(out + c[:, None] * NR + r[None, :], mask=inside, other=0.0, cache_modifier=".cg") * plain
        if BITS == 16:
            x += coded
        else:
            x = _product(_block(rotation, start, D, DP, BITS, COLUMNS), coded, x, 2)
            if TERMS > 1:
                x = _product(_block(rotation + D * D, start, D, DP, BITS, COLUMNS), coded, x, 1)
        tl.store(result + (first_row + r)[None, :] * D + c[:, None], x.to(result.dtype.element_ty), mask=inside)
