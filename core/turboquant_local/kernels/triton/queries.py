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
    ROWS: tl.constexpr = row.shape[0]
    # By products too: a reduction among warps waits five times.
    squares = tl.zeros([ROWS, ROWS], tl.float32)
    along = tl.zeros([16, ROWS], tl.float32)
    x = tl.zeros([DP, ROWS], tl.float32)
    for start in tl.static_range(0, DP, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        matrix = rotation + channels[:, None] * D + k[None, :]
        inside = (channels < D)[:, None] & (k < D)[None, :]
        first = tl.load(matrix, mask=inside, other=0.0)
        part = tl.load(q + row[None, :] * D + k[:, None], mask=valid[None, :] & (k < D)[:, None], other=0.0)
        turned = tl.load(q + row[:, None] * D + k[None, :], mask=valid[:, None] & (k < D)[None, :], other=0.0)
        squares = tl.dot(turned, part, acc=squares, input_precision="ieee")
        if MEAN:
            rows = tl.zeros([16, 1], tl.int32) + k[None, :]
            middle = tl.load(mean + rows, mask=rows < D, other=0.0)
            along = tl.dot(middle, part, acc=along, input_precision="ieee")
        part = part.to(tl.float32)
        x = _product(first, part, x, Q_TERMS)
        if TERMS > 1:
            x = _product(tl.load(matrix + D * D, mask=inside, other=0.0), part, x, 1)
    i = tl.arange(0, ROWS)
    square = tl.sum(tl.where(i[:, None] == i[None, :], squares, 0.0), 0)
    norm = tl.maximum(tl.sqrt(square), 1e-30)
    return x * (1 / norm)[None, :], norm, tl.max(along, 0)


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
        out: `[shares, NR, DP]`, as `decode_kernels.attend` leaves it.
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
    QUADS: tl.constexpr = DP * NR // 4
    r = tl.arange(0, QUADS) // (DP // 4)  # every quad of values has a softmax of its own: no thread waits for others
    top = tl.full([QUADS], -INFINITY, tl.float32)
    mass = tl.full([QUADS], 0.0, tl.float32)
    if SINK:
        top = tl.load(sink_logits + (first_head + tl.minimum(r, present - 1)) // Q_LENGTH).to(tl.float32) * LOG2E
        mass += 1.0
    coded = tl.zeros([QUADS, 4], tl.float32)
    i = tl.arange(0, SHARES)[None, :]
    entry = tl.arange(0, QUADS)[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    plain = tl.load(lse + r, mask=r < present, other=-INFINITY, cache_modifier=".cg")
    count = tl.where(r < present, shares, 0)[:, None]
    for start in range(0, shares, SHARES):
        share = start + i
        known = (share < count)[:, :, None]
        if D < DP:
            known &= value_channels(entry % DP, D, DP, BITS) < D
        at = out + start * (DP * NR) + (i[:, :, None] * (DP * NR) + entry)
        x = tl.load(at, mask=known, other=0.0, cache_modifier=".cg")
        part = tl.load(lse + start * NR + (i * NR + r[:, None]), share < count, other=-INFINITY, cache_modifier=".cg")
        new = tl.maximum(top, tl.max(part, 1))
        base = tl.where(new == -INFINITY, 0.0, new)
        decay = tl.exp2(top - base)
        part = tl.exp2(part - base[:, None])
        mass = mass * decay + tl.sum(part, 1)
        part = tl.where(share > 0, part, 0.0)  # the first share is not coded
        coded = coded * decay[:, None] + tl.sum(x * part[:, :, None], 1)
        top = new
    inverse = 1 / tl.where(mass > 0, mass, 1.0)
    plain = tl.exp2(plain - tl.where(top == -INFINITY, 0.0, top)) * inverse
    plain = tl.max(tl.reshape(plain, [NR, DP // 4]), 1)[None, :]
    coded = tl.permute(tl.reshape(coded * inverse[:, None], [NR, DP]), [1, 0])
    r = tl.arange(0, NR)
    for start in tl.static_range(0, DP, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        inside = (c < D)[:, None] & (r < present)[None, :]
        x = tl.load(out + c[:, None] + r[None, :] * DP, mask=inside, other=0.0, cache_modifier=".cg") * plain
        if BITS == 16:
            x += coded
        else:
            x += _turned(_block(rotation, start, D, DP, BITS, COLUMNS), coded)
            if TERMS > 1:
                x += _turned(_block(rotation + D * D, start, D, DP, BITS, COLUMNS), coded)
        tl.store(result + (first_row + r)[None, :] * D + c[:, None], x.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _turned(matrix, x):
    """`matrix @ x`, with x in float32 rounded to two terms of the matrix' type if that is a 16-bit one."""
    if matrix.dtype == tl.float32:
        y = tl.dot(matrix, x, input_precision="ieee")
    else:  # both terms by one product: side by side they fill its columns
        high = x.to(matrix.dtype)
        both = tl.join(high, (x - high.to(tl.float32)).to(matrix.dtype))
        y = tl.dot(matrix, tl.reshape(both, [x.shape[0], 2 * x.shape[1]]))
        one, other = tl.split(tl.reshape(y, [matrix.shape[0], x.shape[1], 2]))
        y = one + other
    return y
