"""Tiles of packed tokens for many queries, queries in the space of the codes, and the way back: device functions.

A packed tile is decoded in float16, scale included and without the centre of the grid: an entry is its number of steps
times `LIFT` / 512, for a token whose scale is 1 in the part's unit. Channels lie in the order in which decoding gives
them without moving (`coded_channel`); the rotation of the queries brings them into that order too.
"""

import triton
import triton.language as tl

from turboquant_local.codec.scales import STEPS_PER_OCTAVE, UNIT_CODE
from turboquant_local.kernels.triton.codes import centre, levels, lowered, slots

LIFT = tl.constexpr(16.0)
_STEPS, _UNIT_CODE = tl.constexpr(STEPS_PER_OCTAVE), tl.constexpr(UNIT_CODE)
_QUERY_LIFT = tl.constexpr(64.0)
"""Rotated queries of norm 1 are held as so many times themselves: well inside float16 on both sides."""


@triton.jit
def coded_channel(at, D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr):
    """Channel at a place of a decoded tile whose packed elements hold S codes; D for padding."""
    element = at % (DP // S)
    return tl.where(element < D // S, S * element + at // (DP // S), D)


@triton.jit
def _product(a, b, acc, TERMS: tl.constexpr):
    """Add `a @ b`, with a in float32 rounded to so many terms of b's type if that is a 16-bit one."""
    high = a.to(b.dtype)
    acc = tl.dot(high, b, acc=acc, input_precision="ieee")
    if TERMS > 1 and b.dtype != tl.float32:
        acc = tl.dot((a - high.to(tl.float32)).to(b.dtype), b, acc=acc, input_precision="ieee")
    return acc


@triton.jit
def rotated_queries(
    q_rows, valid, rotation, mean,
    D: tl.constexpr, DP: tl.constexpr, ORDER: tl.constexpr, MEAN: tl.constexpr,
    TERMS: tl.constexpr, Q_TERMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Queries in the space of the codes.

    Args:
        q_rows: Pointers to the queries, `[BM]`.
        valid: Which of them there are.
        rotation: `[TERMS, D, D]`, the rotation as a sum.
        mean: What was taken off the keys, `[D]`.
        D: Size of a query.
        DP: The next power of 2.
        ORDER: As in `load_tile`.
        MEAN: Whether there is one.
        TERMS: Terms of the rotation.
        Q_TERMS: Terms in which a query is exact enough.
        COLUMNS: Coordinates of a query taken at once.

    Returns:
        `[BM, DP]` float32 of norm `_QUERY_LIFT`, what they are to be multiplied by, and their products with the mean.
    """
    channel = coded_channel(tl.arange(0, DP), D, DP, ORDER)
    x = tl.zeros([q_rows.shape[0], DP], tl.float32)
    square = tl.zeros([q_rows.shape[0]], tl.float32)
    along = square
    for start in tl.static_range(0, DP, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        part = tl.load(q_rows[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        at = rotation + channel[None, :] * D + d[:, None]
        inside = (channel < D)[None, :] & (d < D)[:, None]
        x = _product(part, tl.load(at, mask=inside, other=0.0), x, Q_TERMS)
        if TERMS > 1:
            x = _product(part, tl.load(at + D * D, mask=inside, other=0.0), x, 1)
        square += tl.sum(part * part, 1)
        if MEAN:
            along += tl.sum(part * tl.load(mean + d, mask=d < D, other=0.0).to(tl.float32)[None, :], 1)
    norm = tl.maximum(tl.sqrt(square), 1e-20) / _QUERY_LIFT
    return x / norm[:, None], norm, along


@triton.jit
def rotated_back(acc, rotation, D: tl.constexpr, DP: tl.constexpr, ORDER: tl.constexpr, TERMS: tl.constexpr):
    """Sums of values `[BM, DP]` out of the space of the codes."""
    x = tl.zeros_like(acc)
    if DP > 128:  # by halves: the matrix would fill the shared memory
        first, second = tl.split(tl.permute(tl.reshape(acc, [acc.shape[0], 2, DP // 2]), [0, 2, 1]))
        x = _rotated_back(first, x, rotation, 0, D, DP, ORDER, TERMS)
        x = _rotated_back(second, x, rotation, DP // 2, D, DP, ORDER, TERMS)
    else:
        x = _rotated_back(acc, x, rotation, 0, D, DP, ORDER, TERMS)
    return x


@triton.jit
def _rotated_back(
    part, x, rotation, start, D: tl.constexpr, DP: tl.constexpr, ORDER: tl.constexpr, TERMS: tl.constexpr
):  # fmt: skip
    channel = coded_channel(start + tl.arange(0, part.shape[1]), D, DP, ORDER)
    d = tl.arange(0, DP)
    at = rotation + channel[:, None] * D + d[None, :]
    inside = (channel < D)[:, None] & (d < D)[None, :]
    x = _product(part, tl.load(at, mask=inside, other=0.0), x, 2)
    if TERMS > 1:
        x = _product(part, tl.load(at + D * D, mask=inside, other=0.0), x, 1)
    return x


@triton.jit
def _load(at, token, element, left, SIZE: tl.constexpr, REAL: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    at += token * SIZE + element
    if FULL and REAL == C:
        x = tl.load(at)
    elif FULL:
        x = tl.load(at, mask=element < REAL, other=0)
    else:
        x = tl.load(at, mask=(token < left) & (element < REAL), other=0)
    return x


@triton.constexpr_function
def vector_size(size: int, bits: int) -> int:
    """Bytes of a packed vector, or elements of one that is not."""
    return size if bits == 16 else size * bits // 8


@triton.constexpr_function
def piece_length(most: int, elements: int, tokens: int, warps: int) -> int:
    """Neighbouring elements that a lane takes: many, but not so that every lane takes one piece alone.

    From that the compiler (triton 3.6) would infer that the tile is to lie in shared memory the other way round.
    """
    length = min(most, elements)
    return length // 2 if tokens * elements == 32 * warps * length else length


@triton.jit
def load_scales(scales, first, length, BITS: tl.constexpr, BN: tl.constexpr):
    """Scales of a tile's tokens as they are stored, `[BN / 8, 8]`; 0 behind `length`."""
    if BITS == 16:
        x = tl.zeros([BN // 8, 8], tl.uint8)
    else:
        token = first + 8 * tl.arange(0, BN // 8)[:, None] + tl.arange(0, 8)[None, :]
        x = tl.load(scales + token, mask=token < length, other=0)
    return x


@triton.jit
def load_tile(
    codes, scales, unit, table, first, length,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, GRID: tl.constexpr, ORDER: tl.constexpr,
    BN: tl.constexpr, WARPS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Keys or values of the tokens from `first` on, `[BN, DP]`.

    Args:
        codes: Pointer to a head's packed vectors, or with 16 bits to the vectors themselves.
        scales: Of `load_scales`.
        unit: What scales of 16 bits are relative to.
        table: Centroids where GRID is false.
        first: First token of the tile.
        length: Tokens there are; those behind have codes and scales of 0.
        D: Size of a vector.
        DP: The next power of 2.
        BITS: Bits a coordinate.
        GRID: Whether the codebook is a uniform grid.
        ORDER: Slots that name the order of the channels (`coded_channel`).
        BN: Tokens.
        WARPS: Warps of the program.
        DTYPE: Of the decoded tile.
        FAST: See `codes.levels`.
        FULL: Whether the tile ends before `length`.
    """
    S: tl.constexpr = slots(BITS, DP)
    C: tl.constexpr = DP // S
    REAL: tl.constexpr = D // S
    SIZE: tl.constexpr = vector_size(D, BITS)
    left = length - first
    at = codes + first.to(tl.int64) * SIZE
    if BITS == 16:
        x = _load(at, tl.arange(0, BN)[:, None], tl.arange(0, C)[None, :], left, SIZE, REAL, C, FULL)
    else:
        BYTES: tl.constexpr = 2 if BITS * S % 16 == 0 or BITS == 6 else 1  # an element of the first plane
        # Lanes take 16 bytes of each of 8 neighbouring tokens in turn: the decoded tile is then written to shared
        # memory, as the tensor core swizzles it there, without bank conflicts.
        E: tl.constexpr = piece_length(16 // BYTES, C, BN, WARPS)
        piece = tl.arange(0, BN * C // E)[:, None]
        token = piece // (8 * C // E) * 8 + piece % 8
        element = E * (piece // 8 % (C // E)) + tl.arange(0, E)[None, :]
        plane = at.to(tl.pointer_type(tl.uint16 if BYTES == 2 else tl.uint8), bitcast=True)
        a = _load(plane, token, element, left, SIZE // BYTES, REAL, C, FULL)
        b = a
        c = a
        if BITS == 6:
            b = _load(at + D // 2, token, element, left, SIZE, REAL, C, FULL)
        if BITS == 3:
            b = _load(plane + REAL, token, element, left, SIZE // BYTES, REAL, C, FULL)
            c = _load(plane + 2 * REAL, token, element, left, SIZE // BYTES, REAL, C, FULL)
        x = tl.reshape(levels(a, b, c, table, BITS, S, GRID, DTYPE, FAST), [BN // 8, C // E, 8, E, S])
        if GRID:
            x = x * (lowered(tl.arange(0, S), BITS) * 2.0**15).to(DTYPE)[None, None, None, None, :]
            x = x - tl.full([1, 1, 1, 1, 1], centre(BITS, True, tl.float32 == DTYPE) / 512, DTYPE)
        if scales.dtype == tl.uint8:
            scale = tl.where(scales == 0, 0.0, tl.exp2((scales.to(tl.float32) - _UNIT_CODE) * (1 / _STEPS)))
        else:
            scale = scales.to(tl.float32) / unit
        x = x * (scale * LIFT).to(DTYPE)[:, None, :, None, None]
        if ORDER == S:
            x = tl.permute(x, [0, 2, 4, 1, 3])
        else:
            x = tl.permute(tl.reshape(tl.permute(x, [0, 2, 1, 3, 4]), [BN, DP // ORDER, ORDER]), [0, 2, 1])
        x = tl.reshape(x, [BN, DP])
    return x


@triton.jit
def tile_unit(table, unit, BITS: tl.constexpr, GRID: tl.constexpr):
    """What 1 in a decoded tile stands for."""
    if BITS == 16:
        x = 1.0
    else:
        x = unit / LIFT
        if GRID:  # the distance of neighbouring levels
            x *= (tl.load(table + (2**BITS - 1)) - tl.load(table)) / (2**BITS - 1) * 512
    return x
