"""Device code of error feedback, see `codec.feedback`: what the weights come to, and the codes of a tile of vectors."""

import triton
import triton.language as tl

from turboquant_local.kernels.triton.packing import rounded_scales, store_codes, store_scales
from turboquant_local.kernels.triton.quantize_kernel import (
    best_grid,
    coded,
    levels_of,
    packed_levels,
    packed_tile,
    refined,
)

_PANEL = tl.constexpr(16)
"""Coordinates between two matrix products; inside a panel errors are passed on one by one."""


@triton.jit
def _gram(rotation, weights, INVERSE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr):
    """The rotation times a diagonal times the rotation transposed, `[DP, DP]` float32.

    Args:
        rotation: `[D, D]` float32.
        weights: `[D]`, the diagonal.
        INVERSE: Take 1 over the weights.
        D: Size of a vector.
        DP: The next power of 2.
        BLOCK: Columns at once.
    """
    row = tl.arange(0, DP)[:, None]
    out = tl.zeros([DP, DP], tl.float32)
    for first in tl.range(0, DP, BLOCK, num_stages=1):
        column = first + tl.arange(0, BLOCK)
        part = tl.load(rotation + row * D + column[None, :], mask=(row < D) & (column[None, :] < D), other=0.0)
        weight = tl.load(weights + column, mask=column < D, other=1.0).to(tl.float32)
        out = tl.dot(
            part * (1.0 / weight if INVERSE else weight)[None, :], tl.trans(part), acc=out, input_precision="tf32x3"
        )
    return out


@triton.jit
def weigh(rotation, weights, passed_on, metric, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr):
    """For each head, what an error adds to later targets, and the metric of errors.

    With W the diagonal of the weights and Π the rotation: Gaussian elimination of Π W^-1 Π', whose rows over their
    pivots say it, and Π W Π' itself.

    Args:
        rotation: `[D, D]` float32.
        weights: `[pairs, D]`.
        passed_on: Out, `[pairs, DP, DP]` float32: row i, column j > i has what the error of coordinate i, times -1,
            adds to the target of j; the rest is 0.
        metric: Out, `[pairs, DP, DP]` float16.
        D: Size of a vector.
        DP: The next power of 2.
        BLOCK: Columns of the rotation at once.
    """
    pair = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, DP)
    whole = pair * DP * DP + row[:, None] * DP + row[None, :]
    tl.store(metric + whole, _gram(rotation, weights + pair * D, False, D, DP, BLOCK).to(tl.float16))
    rest = _gram(rotation, weights + pair * D, True, D, DP, BLOCK)
    PANELS: tl.constexpr = DP // _PANEL
    panel = tl.arange(0, PANELS)[None, :, None]
    inner = tl.arange(0, _PANEL)[None, :]
    for p in tl.range(0, (D + _PANEL - 1) // _PANEL, num_stages=1):
        columns = tl.sum(tl.where(panel == p, tl.reshape(rest, [DP, PANELS, _PANEL]), 0.0), 1)
        diagonal = row[:, None] - p * _PANEL == inner
        for i in tl.static_range(_PANEL):
            pivots = tl.sum(tl.where(inner == i, columns, 0.0), 1)
            # The matrix is symmetric: the pivot column's part in this panel is the pivot row's.
            across = tl.sum(tl.where(diagonal, pivots[:, None], 0.0), 0)[None, :]
            pivot = tl.sum(tl.where(inner == i, across, 0.0), 1)[None, :]
            columns -= pivots[:, None] * tl.where(inner > i, across / tl.where(pivot > 0, pivot, 1.0), 0.0)
        pivot = tl.sum(tl.where(diagonal, columns, 0.0), 0)[None, :]
        share = columns / tl.where(pivot > 0, pivot, 1.0)
        later = row[:, None] - p * _PANEL > inner
        tl.store(passed_on + pair * DP * DP + (p * _PANEL + inner) * DP + row[:, None], tl.where(later, share, 0.0))
        rest = tl.dot(share, -tl.trans(columns), acc=rest, input_precision="tf32x3")


@triton.jit
def _in_core_order(x):
    """Channels as the tensor core hands out columns, so that those of a panel belong to one thread: names alone."""
    DP: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, [x.shape[0], 4, DP // 8, 2]), [0, 2, 1, 3]), [x.shape[0], DP])


@triton.jit
def _in_own_order(x):
    """The inverse of `_in_core_order`."""
    DP: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, [x.shape[0], DP // 8, 4, 2]), [0, 2, 1, 3]), [x.shape[0], DP])


@triton.jit
def _column(x, i: tl.constexpr):
    """A column alone; where a thread has all of them, no instruction: integers that are 0 add for nothing."""
    bits = tl.where(tl.arange(0, x.shape[1])[None, :] == i, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 1).to(tl.float32, bitcast=True)


@triton.jit
def _first_column(x):
    return (_column(x, 0),)


@triton.jit
def _code_panel(block, rows, DP: tl.constexpr, BITS: tl.constexpr):
    """Targets of a panel's coordinates, given those without the errors of the panel itself.

    Args:
        block: `[tokens, PANEL]` float32.
        rows: Pointer to the panel's own square of `passed_on`.
        DP: Length of a row.
        BITS: 1 to 8.
    """
    inner = tl.arange(0, _PANEL)[None, :]
    targets = _first_column(block)
    for i in tl.static_range(1, _PANEL):
        targets += (_column(block, i),)
    for i in tl.static_range(_PANEL):
        now = targets[0]
        block = tl.where(inner == i, now[:, None], block)
        error = now - levels_of(coded(now, 1.0 / (2**BITS - 1), BITS), BITS)
        later = targets[:0]
        for j in tl.static_range(i + 1, _PANEL):
            later += (targets[j - i] - error * tl.load(rows + i * DP + j),)
        targets = later
    return block


@triton.jit(do_not_specialize=["tokens", "heads"])
def feedback_tiles(
    near_codes, near_scales, units, passed_on, codes, tokens, heads,
    code_stride_b, code_stride_h, scale_stride_b, scale_stride_h,
    D: tl.constexpr, DP: tl.constexpr, NEAR_BITS: tl.constexpr, BITS: tl.constexpr, SHARES: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """Code a tile of BT vectors that are on a grid already, each error made up for by later coordinates.

    Args:
        near_codes: As for `quantize_kernel.requantize_tiles`, and so are those not named here.
        near_scales: Likewise.
        units: Likewise.
        passed_on: See `weigh`.
        codes: Out, `[pairs, tokens, D * BITS / 8]` uint8.
        tokens: Vectors of a pair.
        heads: Heads.
        code_stride_b: Of `near_codes`.
        code_stride_h: Likewise.
        scale_stride_b: Of `near_scales`.
        scale_stride_h: Likewise.
        D: Size of a vector.
        DP: The next power of 2.
        NEAR_BITS: 1 to 8.
        BITS: 1 to 8.
        SHARES: See `quantize_kernel.best_grid`.
        BT: Vectors of a tile.
    """
    pair = tl.program_id(0)
    token = tl.program_id(1) * BT + tl.arange(0, BT)[:, None]
    shown = token < tokens
    y, _, _ = packed_tile(
        near_codes, near_scales, units, pair, heads, token, shown,
        code_stride_b, code_stride_h, scale_stride_b, scale_stride_h, NEAR_BITS, D, DP,
    )  # fmt: skip
    inverse, _, _ = best_grid(y, BITS, SHARES, D)
    TOP: tl.constexpr = 2**BITS - 1
    target = _in_core_order(y * (inverse * TOP)[:, None])  # in steps
    PANELS: tl.constexpr = DP // _PANEL
    panel = tl.arange(0, PANELS)[None, :, None]
    inner = tl.arange(0, _PANEL)
    channel = tl.max(_in_core_order(tl.arange(0, DP)[None, :]), 0)
    for p in tl.range(0, (D + _PANEL - 1) // _PANEL, num_stages=1):
        parts = tl.reshape(_in_own_order(target), [BT, PANELS, _PANEL])
        block = tl.sum(tl.where(panel == p, parts, 0.0), 1)
        rows = passed_on + pair.to(tl.int64) * DP * DP + p * _PANEL * DP
        later = tl.load(rows + inner[:, None] * DP + channel[None, :])
        block = _code_panel(block, rows + p * _PANEL, DP, BITS)
        level = levels_of(coded(block, 1.0 / TOP, BITS), BITS)
        target = tl.dot(level - block, later, acc=target, input_precision="tf32x3")
        # What is done makes room for its levels.
        kept = tl.where(panel == p, level[:, None, :], tl.reshape(_in_own_order(target), [BT, PANELS, _PANEL]))
        target = _in_core_order(tl.reshape(kept, [BT, DP]))
    row = pair.to(tl.int64) * tokens + token
    code = (_in_own_order(target) + TOP / 2).to(tl.int32)
    store_codes(codes + row * (D * BITS // 8), code, shown, BITS, D)


@triton.jit(do_not_specialize=["tokens", "heads", "factor"])
def finish_tiles(
    near_codes, near_scales, units, metric, rough, codes, scales, tokens, heads,
    code_stride_b, code_stride_h, scale_stride_b, scale_stride_h, factor,
    D: tl.constexpr, DP: tl.constexpr, NEAR_BITS: tl.constexpr, BITS: tl.constexpr, SHARES: tl.constexpr,
    SCALE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Give the codes of a tile of BT vectors their scales, and refine those whose scales have 8 bits.

    A kernel of its own: together with `feedback_tiles` it would need twice the registers.

    Args:
        near_codes: As for `feedback_tiles`, and so are those not named here.
        near_scales: Likewise.
        units: Likewise.
        metric: See `weigh`.
        rough: What `feedback_tiles` gave.
        codes: Out, of the same shape.
        scales: Out, `[pairs, tokens]` uint8 or float16.
        tokens: Likewise.
        heads: Likewise.
        code_stride_b: Likewise.
        code_stride_h: Likewise.
        scale_stride_b: Likewise.
        scale_stride_h: Likewise.
        factor: What scales are to be multiplied by: the units of the two levels.
        D: Likewise.
        DP: Likewise.
        NEAR_BITS: Likewise.
        BITS: Likewise.
        SHARES: Likewise.
        SCALE: Kind of scale, as in `MSEQuantizer`, in the metric.
        BT: Likewise.
    """
    pair = tl.program_id(0)
    token = tl.program_id(1) * BT + tl.arange(0, BT)[:, None]
    shown = token < tokens
    y, near_scale, unit = packed_tile(
        near_codes, near_scales, units, pair, heads, token, shown,
        code_stride_b, code_stride_h, scale_stride_b, scale_stride_h, NEAR_BITS, D, DP,
    )  # fmt: skip
    row = pair.to(tl.int64) * tokens + token
    level = packed_levels(rough, row, shown, BITS, D, DP)
    channel = tl.arange(0, DP)
    metric += pair.to(tl.int64) * DP * DP
    whole = tl.load(metric + channel[:, None] * DP + channel[None, :])
    weighted = tl.dot(y.to(tl.float16), whole)  # levels are float16 exactly
    pulled = tl.dot(level.to(tl.float16), whole)
    dot = tl.sum(weighted * level, 1)
    if SCALE == "unbiased":
        scale = tl.sum(weighted * y, 1) / tl.where(dot > 0, dot, 1.0)
    elif SCALE == "least_error":
        scale = dot / tl.sum(pulled * level, 1)
    else:
        inverse, _, _ = best_grid(y, BITS, SHARES, D)
        scale = 1.0 / (inverse * (2**BITS - 1))
    factors = near_scale * factor
    scale *= factors
    if scales.dtype.element_ty == tl.uint8:
        scale = rounded_scales(scale)
        step = scale / tl.maximum(factors, 1e-37)
        gradient = step[:, None] * pulled - weighted
        diagonal = tl.load(metric + channel * (DP + 1)).to(tl.float32)[None, :]
        level = refined(y, level, step, weighted, gradient, diagonal, metric, True, BITS, D)
    store_codes(codes + row * (D * BITS // 8), (level + (2**BITS - 1) / 2).to(tl.int32), shown, BITS, D)
    store_scales(scales + row, scale[:, None], unit, shown)
