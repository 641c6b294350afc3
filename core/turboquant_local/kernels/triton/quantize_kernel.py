"""Device code of quantisation on a uniform grid: centre, rotate, code, correct the scale and pack, in one pass."""

import triton
import triton.language as tl

from turboquant_local.codec.refine import STRETCH
from turboquant_local.kernels.triton.packing import load_codes, load_scales, rounded_scales, store_codes, store_scales

_STRETCH = tl.constexpr(STRETCH)
_MAGIC = tl.constexpr(2.0**23)
"""Added to a float32 below it, it leaves the nearest integer, and that in the lowest bits."""


@triton.jit
def coded(y, inverse, BITS: tl.constexpr):
    """Codes as float32, `_MAGIC` above their value.

    Args:
        y: Coordinates.
        inverse: What makes of them shares of the whole grid, which reaches from -1/2 to 1/2.
        BITS: Bits of a code.
    """
    if BITS == 1:
        return tl.where(y < 0, 0.0, 1.0) + _MAGIC
    return tl.clamp(y * inverse + 0.5, 0.0, 1.0) * (2**BITS - 1) + _MAGIC


@triton.jit
def levels_of(code, BITS: tl.constexpr):
    """Levels, in steps, of what `coded` gave."""
    return code - _MAGIC - (2**BITS - 1) / 2


@triton.jit
def _fit(y, inverse, BITS: tl.constexpr, D: tl.constexpr):
    level = levels_of(coded(y, inverse[:, None], BITS), BITS)
    if y.shape[1] > D:
        level = tl.where(tl.arange(0, y.shape[1])[None, :] < D, level, 0.0)
    return tl.sum(y * level, 1), tl.sum(level * level, 1)


@triton.jit
def best_grid(y, BITS: tl.constexpr, SHARES: tl.constexpr, D: tl.constexpr):
    """The step for each vector that leaves the least error, see `codec.grid.vector_steps`.

    Args:
        y: `[tokens, channels]` float32; channels from D on are 0.
        BITS: 1 to 8.
        SHARES: Steps to choose from, as shares of the one that just holds the largest coordinate.
        D: Size of a vector.

    Returns:
        `inverse` of `coded`, then <y, levels> and <levels, levels>, each `[tokens]`.
    """
    whole = 0.5 / tl.maximum(tl.max(tl.abs(y), 1), 1e-30)
    best = whole / SHARES[0]
    dot, square = _fit(y, best, BITS, D)
    for i in tl.static_range(1, len(SHARES)):
        inverse = whole / SHARES[i]
        other_dot, other_square = _fit(y, inverse, BITS, D)
        cosine, other_cosine = dot * whole, other_dot * whole  # in a range where squares are safe
        better = other_cosine * other_cosine * square > cosine * cosine * other_square
        best = tl.where(better, inverse, best)
        dot = tl.where(better, other_dot, dot)
        square = tl.where(better, other_square, square)
    return best, dot, square


@triton.jit
def refined(
    y, level, step, weighted, gradient, diagonal, metric,
    METRIC: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Levels, of which up to two of each vector are moved, see `codec.refine`.

    Args:
        y: `[tokens, channels]` float32.
        level: In steps, of the same shape.
        step: `[tokens]`, what levels are read with.
        weighted: y times the metric.
        gradient: The error, step * level - y, times the metric.
        diagonal: `[channels]`, of the metric, or 1.
        metric: Pointer to `[channels, channels]`, or anything where METRIC is false and it is the identity.
        METRIC: Whether there is one.
        BITS: 1 to 8.
        D: Size of a vector.
    """
    channel = tl.arange(0, y.shape[1])[None, :]
    along = 1.0 / tl.maximum(tl.sum(weighted * y, 1), 1e-37) * _STRETCH
    stretch = tl.sum((step[:, None] * level - y) * weighted, 1) * along
    curvature = step[:, None] * (diagonal + weighted * weighted * along[:, None])
    for last in tl.static_range(2):
        slope = gradient + stretch[:, None] * weighted
        sign = tl.where(slope > 0, -1.0, 1.0)
        change = curvature - 2 * tl.abs(slope)
        change = tl.where((level * sign >= (2**BITS - 1) / 2) | (channel >= D), float("inf"), change)
        least = tl.min(change, 1)
        at = tl.min(tl.where(change == least[:, None], channel, D), 1)  # the first, as torch has it
        move = tl.where((channel == at[:, None]) & (least < 0)[:, None], sign, 0.0)
        level += move
        if last == 0:
            stretch += tl.sum(move * weighted, 1) * step * along
            if METRIC:
                passed = tl.load(metric + at[:, None] * y.shape[1] + channel).to(tl.float32)
                gradient += (step * tl.sum(move, 1))[:, None] * passed
            else:
                gradient += step[:, None] * move
    return level


@triton.jit
def _pack(
    y, code_at, scale_at, factor, unit, shown,
    BITS: tl.constexpr, SHARES: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Code a tile of vectors and store codes and scales.

    Args:
        y: `[tokens, channels]` float32, rotated; channels from D on are 0.
        code_at: `[tokens, 1]` pointers.
        scale_at: Likewise.
        factor: `[tokens]` or one for all: what scales are to be multiplied by.
        unit: Of 8-bit scales.
        shown: `[tokens, 1]`: which vectors there are.
        BITS: 1 to 8.
        SHARES: See `best_grid`.
        SCALE: Kind of scale, as in `MSEQuantizer`.
        D: Size of a vector.
    """
    inverse, dot, square = best_grid(y, BITS, SHARES, D)
    code = coded(y, inverse[:, None], BITS)
    if SCALE == "unbiased":
        scale = tl.sum(y * y, 1) / tl.where(dot > 0, dot, 1.0)
    elif SCALE == "least_error":
        scale = dot / square
    else:
        scale = tl.where(dot > 0, 1.0 / (inverse * (2**BITS - 1)), 0.0)  # the norm, on the grid of this vector
    scale *= factor
    if scale_at.dtype.element_ty == tl.uint8:
        scale = rounded_scales(scale)
        step = scale / tl.maximum(factor, 1e-37)
        level = levels_of(code, BITS)
        level = refined(y, level, step, y, step[:, None] * level - y, 1.0, y, False, BITS, D)
        code = level + (2**BITS - 1) / 2 + _MAGIC
    store_codes(code_at, code.to(tl.int32, bitcast=True) & (2**BITS - 1), shown, BITS, D)
    store_scales(scale_at, scale[:, None], unit, shown)


@triton.jit
def rotated(x_at, matrix, shown, whole, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Rotated vectors, `[tokens, DP]` float32.

    The matrix gives its columns in the order in which the tensor core hands out its results, so that a thread gets
    neighbours, and packing moves nothing between threads; here they get their names.

    Args:
        x_at: `[tokens, 1]` pointers to vectors.
        matrix: `[DP, DP]`, see `quantize._matrix`. In 16 bits its product with 16-bit vectors is exact to float32.
        shown: `[tokens, 1]`: which vectors there are.
        whole: The matrix, loaded, where BLOCK is DP.
        BLOCK: Coordinates of x at once.
        D: Size of a vector.
        DP: The next power of 2.
    """
    if BLOCK == DP:
        k = tl.arange(0, DP)[None, :]
        y = tl.dot(tl.load(x_at + k, mask=shown & (k < D), other=0.0), whole)
    else:
        y = tl.zeros([x_at.shape[0], DP], tl.float32)
        for first in tl.range(0, DP, BLOCK, num_stages=1):
            k = first + tl.arange(0, BLOCK)
            x = tl.load(x_at + k[None, :], mask=shown & (k[None, :] < D), other=0.0).to(matrix.dtype.element_ty)
            block = tl.load(matrix + k[:, None] * DP + tl.arange(0, DP)[None, :])
            y = tl.dot(x, block, acc=y, input_precision="tf32x3")
    y = tl.reshape(y, [y.shape[0], DP // 8, 4, 2])
    return tl.reshape(tl.permute(y, [0, 2, 1, 3]), [y.shape[0], DP])


@triton.jit(do_not_specialize=["tokens", "heads", "factor"])
def quantize_tiles(
    x, mean, matrix, units, codes, scales, tokens, heads, stride_b, stride_h, stride_t, factor,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, SHARES: tl.constexpr, SCALE: tl.constexpr,
    MEAN: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Quantise tiles of BT vectors of a head, every `num_programs`-th.

    Args:
        x: Vectors at `stride_b`, `stride_h`, `stride_t`.
        mean: `[pairs, D]` to subtract, in the dtype of x, or anything where MEAN is false.
        matrix: See `rotated`.
        units: `[pairs]` float32, the units of 8-bit scales, or anything for float16.
        codes: Out, `[pairs, tokens, D * BITS / 8]` uint8.
        scales: Out, `[pairs, tokens]` uint8 or float16.
        tokens: Vectors of a pair of sequence and head.
        heads: Heads.
        stride_b: Of the batch.
        stride_h: Of the heads.
        stride_t: Of the tokens.
        factor: What scales are to be multiplied by: the units of matrix and levels.
        D: Size of a vector.
        DP: The next power of 2.
        BITS: 1 to 8.
        SHARES: See `best_grid`.
        SCALE: Kind of scale, as in `MSEQuantizer`.
        MEAN: Whether there is a mean.
        BLOCK: See `rotated`.
        BT: Vectors of a tile.
        STAGES: Tiles on their way at once.
    """
    pair = tl.program_id(0)
    whole = matrix
    if BLOCK == DP:  # small enough to stay in shared memory
        k = tl.arange(0, DP)
        whole = tl.load(matrix + k[:, None] * DP + k[None, :])
    rows = tl.arange(0, BT)[:, None]
    if MEAN:
        centre = tl.max(rotated(mean + pair * D + rows * 0, matrix, rows >= 0, whole, BLOCK, D, DP), 0)
    unit = tl.load(units + pair) if scales.dtype.element_ty == tl.uint8 else 1.0
    x += (pair // heads).to(tl.int64) * stride_b + (pair % heads).to(tl.int64) * stride_h
    for tile in tl.range(tl.program_id(1), tl.cdiv(tokens, BT), tl.num_programs(1), num_stages=STAGES):
        token = tile * BT + rows
        shown = token < tokens
        y = rotated(x + token.to(tl.int64) * stride_t, matrix, shown, whole, BLOCK, D, DP)
        if MEAN:
            y -= centre[None, :]
        row = pair.to(tl.int64) * tokens + token
        _pack(y, codes + row * (D * BITS // 8), scales + row, factor, unit, shown, BITS, SHARES, SCALE, D)


@triton.jit(do_not_specialize=["tokens", "heads", "factor"])
def requantize_tiles(
    near_codes, near_scales, units, codes, scales, tokens, heads,
    code_stride_b, code_stride_h, scale_stride_b, scale_stride_h, factor,
    D: tl.constexpr, DP: tl.constexpr, NEAR_BITS: tl.constexpr, BITS: tl.constexpr, SHARES: tl.constexpr,
    SCALE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Quantise a tile of BT vectors that are on a grid already.

    Args:
        near_codes: `[batch, heads, tokens, D * NEAR_BITS / 8]` uint8.
        near_scales: `[batch, heads, tokens]` uint8 or float16.
        units: As for `quantize_tiles`, of both scales.
        codes: Likewise.
        scales: Likewise.
        tokens: Likewise.
        heads: Likewise.
        code_stride_b: Of `near_codes`.
        code_stride_h: Likewise.
        scale_stride_b: Of `near_scales`.
        scale_stride_h: Likewise.
        factor: What scales are to be multiplied by: the units of the two levels.
        D: Size of a vector.
        DP: The next power of 2.
        NEAR_BITS: 1 to 8.
        BITS: 1 to 8.
        SHARES: See `best_grid`.
        SCALE: Kind of scale, as in `MSEQuantizer`.
        BT: Vectors of a tile.
    """
    pair = tl.program_id(0)
    token = tl.program_id(1) * BT + tl.arange(0, BT)[:, None]
    shown = token < tokens
    y, near_scale, unit = packed_tile(
        near_codes, near_scales, units, pair, heads, token, shown,
        code_stride_b, code_stride_h, scale_stride_b, scale_stride_h, NEAR_BITS, D, DP,
    )  # fmt: skip
    row = pair.to(tl.int64) * tokens + token
    codes += row * (D * BITS // 8)
    _pack(y, codes, scales + row, near_scale * factor, unit, shown, BITS, SHARES, SCALE, D)


@triton.jit
def packed_levels(codes, token, shown, BITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Levels of packed codes, in steps, `[tokens, DP]` float32; channels from D on are 0."""
    code = load_codes(codes + token.to(tl.int64) * (D * BITS // 8), shown, BITS, D, DP)
    y = code.to(tl.float32) - (2**BITS - 1) / 2
    if D < DP:
        y = tl.where(tl.arange(0, DP)[None, :] < D, y, 0.0)
    return y


@triton.jit
def packed_tile(
    codes, scales, units, pair, heads, token, shown,
    code_stride_b, code_stride_h, scale_stride_b, scale_stride_h,
    BITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Levels of a tile of packed tokens as from `packed_levels`, 0 where the scale is, their scales and the unit.

    Arguments are those of `requantize_tiles`; `units` may be anything where it holds no floats.
    """
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    unit = tl.load(units + pair) if units.dtype.element_ty == tl.float32 else 1.0
    scale = load_scales(scales + batch * scale_stride_b + head * scale_stride_h + token, unit, shown)
    y = packed_levels(codes + batch * code_stride_b + head * code_stride_h, token, shown, BITS, D, DP)
    return tl.where(scale > 0, y, 0.0), tl.sum(scale, 1), unit
