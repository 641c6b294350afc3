"""Device code of decode attention around the tokens: rotate the queries before, merge the shares and rotate back after.

The rotation comes as a sum of TERMS matrices in the type of the products: of bfloat16 one where that is exact (a
Hadamard rotation), else two.
"""

import triton
import triton.language as tl

from turboquant_local.kernels.triton.softmax import INFINITY, LOG2E

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
def rotation_block(rotation, channels, start, D: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS columns of one term of the rotation, from `start` on: `[DP, COLUMNS]`."""
    k = start + tl.arange(0, COLUMNS)
    inside = (channels < D)[:, None] & (k < D)[None, :]
    return tl.load(rotation + channels[:, None] * D + k[None, :], mask=inside, other=0.0)


@triton.jit
def rotated(
    q, rotation, first, mean, row, valid, channels, D: tl.constexpr, DP: tl.constexpr,
    MEAN: tl.constexpr, TERMS: tl.constexpr, Q_TERMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Queries in the space of the codes.

    Args:
        q: `[rows, D]`.
        rotation: `[TERMS, D, D]`.
        first: What `rotation_block` takes of it at 0: it can be asked for before the queries can.
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
        if start > 0:
            first = rotation_block(rotation, channels, start, D, COLUMNS)
        part = tl.load(q + row[None, :] * D + k[:, None], mask=valid[None, :] & (k < D)[:, None], other=0.0)
        turned = tl.load(q + row[:, None] * D + k[None, :], mask=valid[:, None] & (k < D)[None, :], other=0.0)
        if MEAN:
            rows = tl.zeros([16, 1], tl.int32) + k[None, :]
            middle = tl.load(mean + rows, mask=rows < D, other=0.0)
        squares = tl.dot(turned, part, acc=squares, input_precision="ieee")
        if MEAN:
            along = tl.dot(middle, part, acc=along, input_precision="ieee")
        part = part.to(tl.float32)
        x = _product(first, part, x, Q_TERMS)
        if TERMS > 1:
            x = _product(rotation_block(rotation + D * D, channels, start, D, COLUMNS), part, x, 1)
    i = tl.arange(0, ROWS)
    square = tl.sum(tl.where(i[:, None] == i[None, :], squares, 0.0), 0)
    norm = tl.maximum(tl.sqrt(square), 1e-30)
    return x * (1 / norm)[None, :], norm, tl.max(along, 0)


@triton.jit
def _block(rotation, start, DP: tl.constexpr, COLUMNS: tl.constexpr, W: tl.constexpr):
    """COLUMNS columns of the rotation, from `start` on, as rows: `[COLUMNS, DP]`.

    It comes in the order of `decode_attention.fragments`: a thread reads just what the tensor core wants from it.
    """
    WARPS: tl.constexpr = min(W, COLUMNS // 16)
    ROWS: tl.constexpr = COLUMNS // (16 * WARPS)  # of tiles
    i = tl.arange(0, ROWS * (DP // 16))[None, :, None]
    row = start // 16 + i // (DP // 16) * WARPS + tl.arange(0, WARPS)[:, None, None]
    at = (row * (DP // 16) + i % (DP // 16)) * 256 + tl.arange(0, 256)[None, None, :]
    tiles = tl.reshape(tl.load(rotation + at), [WARPS, ROWS, DP // 16, 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(tiles, [1, 0, 6, 3, 2, 5, 4, 7]), [COLUMNS, DP])


@triton.jit
def merge(
    out, lse, sink_logits, rotation, result, shares, first_row, first_head, present,
    D: tl.constexpr, DP: tl.constexpr, NR: tl.constexpr, PLAIN: tl.constexpr, Q_LENGTH: tl.constexpr,
    SINK: tl.constexpr, TERMS: tl.constexpr, W: tl.constexpr, SHARES: tl.constexpr, AGAIN: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge the shares of some queries, and rotate what came from codes back.

    Args:
        out: `[shares, NR, DP]`, as `decode_kernels.attend` leaves it.
        lse: `[shares, NR]`.
        sink_logits: `[q_heads]`, or anything where SINK is false.
        rotation: `[TERMS, DP, DP]` in the order of `decode_attention.fragments`, or anything with PLAIN.
        result: Out, `[rows, D]`.
        shares: Shares of the work.
        first_row: The first query; the others follow.
        first_head: Its number among the heads times Q_LENGTH plus its own among the query tokens.
        present: How many queries there are, of NR.
        D: Size of a value.
        DP: The next power of 2.
        NR: Queries, and room for some.
        PLAIN: Whether values were not rotated.
        Q_LENGTH: Query tokens.
        SINK: Whether there are sink logits.
        TERMS: Terms of the rotation.
        W: Warps.
        SHARES: Shares read at once.
        AGAIN: Whether there are more than those, and the first.
        COLUMNS: Coordinates of the result made at once; all with PLAIN.
    """
    FEW: tl.constexpr = few_values(DP * NR, W)
    RUNS: tl.constexpr = DP * NR // FEW
    r = tl.arange(0, RUNS) // (DP // FEW)  # every run of values has a softmax of its own: no thread waits for others
    row = tl.arange(0, NR)
    count = tl.where(r < present, shares, 0)
    # What depends on nothing is asked for at once: an answer takes longer than all work on it.
    values, logs = _shares(out, lse, 1, count, r, D, DP, NR, SHARES)
    plain = tl.load(lse + r, mask=r < present, other=-INFINITY, cache_modifier=".cg")
    uncoded = _uncoded(out, 0, row < present, D, DP, NR, COLUMNS)
    if not PLAIN:
        turn = _block(rotation, 0, DP, COLUMNS, W)
    coded = tl.zeros([RUNS, FEW], tl.float32)
    if SINK:
        top = tl.load(sink_logits + (first_head + tl.minimum(r, present - 1)) // Q_LENGTH).to(tl.float32) * LOG2E
        top, mass, coded = _added((coded,), (plain,), top, tl.full([RUNS], 1.0, tl.float32), coded)
    else:
        top, mass = plain, tl.where(plain == -INFINITY, 0.0, 1.0)
    top, mass, coded = _added(values, logs, top, mass, coded)
    if AGAIN:
        for start in range(1 + SHARES, shares, SHARES):
            values, logs = _shares(out, lse, start, count, r, D, DP, NR, SHARES)
            top, mass, coded = _added(values, logs, top, mass, coded)
    inverse = 1 / tl.where(mass > 0, mass, 1.0)
    plain = tl.exp2(plain - tl.where(top == -INFINITY, 0.0, top)) * inverse
    plain = tl.max(tl.reshape(plain, [NR, DP // FEW]), 1)[None, :]
    coded = tl.permute(tl.reshape(coded * inverse[:, None], [NR, DP]), [1, 0])
    for start in tl.static_range(0, DP, COLUMNS):
        if start > 0:
            uncoded = _uncoded(out, start, row < present, D, DP, NR, COLUMNS)
        x = uncoded * plain
        if PLAIN:
            x += coded
        else:
            if start > 0:
                turn = _block(rotation, start, DP, COLUMNS, W)
            x += _turned(turn, coded)
            if TERMS > 1:
                x += _turned(_block(rotation + DP * DP, start, DP, COLUMNS, W), coded)
        c = start + tl.arange(0, COLUMNS)
        inside = (c < D)[:, None] & (row < present)[None, :]
        tl.store(result + (first_row + row)[None, :] * D + c[:, None], x.to(result.dtype.element_ty), mask=inside)


@triton.jit
def gather(
    out, lse, first, end, to, present,
    D: tl.constexpr, DP: tl.constexpr, NR: tl.constexpr, W: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Merge coded shares `first` to `end`, at most SHARES, to share `to`; the others are as in `merge`."""
    FEW: tl.constexpr = few_values(DP * NR, W)
    r = tl.arange(0, DP * NR // FEW) // (DP // FEW)
    values, logs = _shares(out, lse, first, tl.where(r < present, end, 0), r, D, DP, NR, SHARES)
    top = tl.full([DP * NR // FEW], -INFINITY, tl.float32)
    top, mass, coded = _added(values, logs, top, tl.zeros_like(top), tl.zeros([DP * NR // FEW, FEW], tl.float32))
    seen = mass > 0
    mass = tl.where(seen, mass, 1.0)
    entry = tl.arange(0, DP * NR // FEW)[:, None] * FEW + tl.arange(0, FEW)[None, :]
    tl.store(out + to * (DP * NR) + entry, coded * (1 / mass)[:, None])
    tl.store(lse + to * NR + r, tl.where(seen, top + tl.log2(mass), -INFINITY))


@triton.constexpr_function
def few_values(size: int, warps: int) -> int:
    """Neighbouring values of a share that a thread reads at once, of `size` in all."""
    return min(4, max(1, size // (32 * warps)))


@triton.jit
def _shares(out, lse, start, count, r, D: tl.constexpr, DP: tl.constexpr, NR: tl.constexpr, SHARES: tl.constexpr):
    """Values `[RUNS, FEW]` and logarithms `[RUNS]` of each of the shares from `start` on, of `count`."""
    FEW: tl.constexpr = DP * NR // r.shape[0]
    entry = tl.arange(0, r.shape[0])[:, None] * FEW + tl.arange(0, FEW)[None, :]
    values = ()
    logs = ()
    for i in tl.static_range(SHARES):
        known = start + i < count
        inside = known[:, None]
        if D < DP:
            inside &= entry % DP < D
        at = start + i
        value = tl.load(out + (at * (DP * NR) + entry), mask=inside, other=0.0, cache_modifier=".cg")
        log = tl.load(lse + (at * NR + r), mask=known, other=-INFINITY, cache_modifier=".cg")
        values = values + (value,)  # type: ignore[assignment] # noqa: RUF005
        logs = logs + (log,)  # type: ignore[assignment] # noqa: RUF005
    return values, logs


@triton.jit
def _added(values, logs, top, mass, coded):
    """Shares taken into a running softmax."""
    new = top
    for i in tl.static_range(len(logs)):
        new = tl.maximum(new, logs[i])
    base = tl.where(new == -INFINITY, 0.0, new)
    decay = tl.exp2(top - base)
    mass *= decay
    coded *= decay[:, None]
    for i in tl.static_range(len(logs)):
        part = tl.exp2(logs[i] - base)
        mass += part
        coded += values[i] * part[:, None]
    return new, mass, coded


@triton.jit
def _uncoded(out, start, present, D: tl.constexpr, DP: tl.constexpr, NR: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS coordinates of the first share, from `start` on: `[COLUMNS, NR]`."""
    c = start + tl.arange(0, COLUMNS)[:, None]
    at = out + c + tl.arange(0, NR)[None, :] * DP
    return tl.load(at, mask=(c < D) & present[None, :], other=0.0, cache_modifier=".cg")


@triton.jit
def _turned(matrix, x):
    """`matrix @ x`, with x in float32 rounded to two terms of the matrix' type if that is a 16-bit one."""
    if matrix.dtype == tl.float32:
        y = tl.dot(matrix, x, input_precision="ieee")
    else:  # a move that must not be repeated: or all that went before would be, in the product's layout
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)
        high = x.to(matrix.dtype)
        y = tl.dot(matrix, high)
        y = tl.dot(matrix, (x - high.to(tl.float32)).to(matrix.dtype), acc=y)
    return y
