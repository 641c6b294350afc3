"""Device code of decode attention, a few programs a query: prepare it, and combine what its shares gave.

Both are short and wait for memory most of the time, so whatever does not depend on something else is loaded first.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["queries_per_kv_head"])
def prepare(
    q, rotation, mean, code, coefficient, offset, queries_per_kv_head,
    D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Rotate one query and divide it by its norm, so that it fits float16.

    Args:
        q: `[rows, D]`, rows = batch * num_q_heads * q_length.
        rotation: `[D, D]` float32.
        mean: `[batch * num_kv_heads, D]`, taken off the keys, or anything where MEAN is false.
        code: Out, `[rows, D]`.
        coefficient: Out, `[rows]` float32: the rotated query is `coefficient * code`.
        offset: Out, `[rows]` float32: the query's product with the mean.
        queries_per_kv_head: Rows that share a mean.
        D: Size of a head.
        DP: The next power of 2.
        COLUMNS: Coordinates of the result that one program makes.
        MEAN: Whether there is a mean.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, DP)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    matrix = tl.load(rotation + c[:, None] * D + k[None, :], mask=(c < D)[:, None] & (k < D)[None, :], other=0.0)
    x = tl.load(q + row * D + k, mask=k < D, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-30)
    if MEAN:
        center = tl.load(mean + row // queries_per_kv_head * D + k, mask=k < D, other=0.0).to(tl.float32)
        tl.store(offset + row, tl.sum(x * center, 0))
    tl.store(coefficient + row, norm)
    tl.store(code + row * D + c, tl.sum(matrix * x[None, :], 1) / norm, mask=c < D)


@triton.jit(do_not_specialize=["shares", "q_length"])
def combine(
    out, lse, sink_logits, rotation, result, shares, q_heads, q_length,
    D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr, SINK: tl.constexpr, ROTATED: tl.constexpr,
    SHARES: tl.constexpr,
):  # fmt: skip
    """Merge the shares of one query, and rotate what came from codes back.

    Args:
        out: `[rows, shares, D]`, as `partials` leaves it.
        lse: `[rows, shares]`.
        sink_logits: `[q_heads]`, or anything where SINK is false.
        rotation: `[D, D]` float32, or anything where ROTATED is false.
        result: Out, `[rows, D]`.
        shares: Shares of the work.
        q_heads: Query heads.
        q_length: Query tokens.
        D: Size of a value.
        DP: The next power of 2.
        COLUMNS: Coordinates of the result that one program makes.
        SINK: Whether there are sink logits.
        ROTATED: Whether the codes of the values are in rotated space.
        SHARES: Shares read at once.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, SHARES)
    if ROTATED:
        square = rotation + d[:, None] * D + c[None, :]
        matrix = tl.load(square, mask=(d < D)[:, None] & (c < D)[None, :], other=0.0)
    plain = tl.load(out + row * shares * D + c, mask=c < D, other=0.0)
    first = tl.load(lse + row * shares)
    top = tl.full([], -INFINITY, tl.float32)
    mass = tl.full([], 0.0, tl.float32)
    if SINK:
        top = tl.load(sink_logits + row // q_length % q_heads).to(tl.float32) * LOG2E
        mass += 1.0
    coded = tl.zeros([DP], tl.float32)
    for start in range(0, shares, SHARES):
        share = start + i
        part = tl.load(lse + row * shares + share, mask=share < shares, other=-INFINITY)
        at = out + (row * shares + share)[:, None] * D + d[None, :]
        x = tl.load(at, mask=((share > 0) & (share < shares))[:, None] & (d < D)[None, :], other=0.0)
        new = tl.maximum(top, tl.max(part, 0))
        base = tl.where(new == -INFINITY, 0.0, new)
        decay = tl.exp2(top - base)
        weight = tl.exp2(part - base)
        mass = mass * decay + tl.sum(weight, 0)
        coded = coded * decay + tl.sum(weight[:, None] * x, 0)
        top = new
    mass = tl.where(mass > 0, mass, 1.0)
    first = tl.exp2(first - tl.where(top == -INFINITY, 0.0, top)) / mass
    if ROTATED:
        x = tl.sum(matrix * coded[:, None], 0) / mass
    else:
        x = tl.sum(tl.where(d[:, None] == c[None, :], coded[:, None], 0.0), 0) / mass
    tl.store(result + row * D + c, (plain * first + x).to(result.dtype.element_ty), mask=c < D)
