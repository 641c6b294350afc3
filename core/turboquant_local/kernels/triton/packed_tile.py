"""One tile of packed tokens of decode attention: device code."""

import triton
import triton.language as tl

from turboquant_local.kernels.triton.codes import UNIT, centre
from turboquant_local.kernels.triton.copied_tiles import load_copied
from turboquant_local.kernels.triton.softmax import INFINITY, softmax_step, visible
from turboquant_local.kernels.triton.tiles import load_keys, load_plain, load_scales, load_values, scales_a_load
from turboquant_local.kernels.triton.token_order import for_values, side_by_side, token_of, tokens_of


@triton.jit
def packed_tile(
    k_codes, k_scales, k_unit, k_table, v_codes, v_scales, v_unit, v_table, mask,
    k_tiles, v_tiles, batch, kv_head, query, coefficient, constant, middle, head, token, start, packed, position,
    kv_length, factor, softcap, stride_mh, stride_mq, stride_mk, m, total, acc, sums,
    KD: tl.constexpr, KDP: tl.constexpr, VD: tl.constexpr, VDP: tl.constexpr, Q_LENGTH: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_GRID: tl.constexpr, V_GRID: tl.constexpr, MEAN: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, K_SCALES: tl.constexpr, V_SCALES: tl.constexpr,
    W: tl.constexpr, BN: tl.constexpr, SIDES: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """One tile of packed tokens: `BN * SIDES` a warp of which none lies behind the last (FULL), or else BN.

    What is not FULL has one side, in the columns of the first.
    """
    ROWS: tl.constexpr = query.shape[2]
    ABREAST: tl.constexpr = SIDES if FULL else 1
    N: tl.constexpr = BN * ABREAST
    ORDER: tl.constexpr = "read" if k_tiles is None or not FULL else ("thirds" if K_BITS == 3 else "copied")
    left = packed - start
    local = tokens_of(W, N, ABREAST, ROWS, ORDER)
    in_range = local < left
    at = token_of(tl.arange(0, W)[:, None], tl.arange(0, N)[None, :], W, ORDER)
    if K_BITS == 16:
        k = load_plain(k_codes + (start.to(tl.int64) + at) * KD, at < left, KD, KDP, FULL)
        s = tl.dot(k, query, input_precision="ieee") * factor
    else:
        k_scales += start // scales_a_load(K_SCALES)
        k_scale, _ = load_scales(k_scales, k_unit, left, W, N, ABREAST, ROWS, K_SCALES, FULL, ORDER)
        if ORDER == "read":
            k = k_codes + start.to(tl.int64) * (KD * K_BITS // 8)
        else:
            k = load_copied(k_tiles, batch, kv_head, start, KD, K_BITS)
        k = load_keys(k, k_table, left, KD, KDP, K_BITS, K_GRID, W, N, DTYPE, FAST, FULL, ORDER)
        s = side_by_side(tl.dot(k, query, input_precision="ieee"), ABREAST)
        s = (s * coefficient[None, None, :] - middle[None, None, :]) * k_scale
    if MEAN:
        s += constant[None, None, :]
    s = visible(
        s, position + start + local, kv_length, mask, head, token, in_range,
        stride_mh, stride_mq, stride_mk, softcap, Q_LENGTH, MASK, CAUSAL, SOFTCAP,
    )  # fmt: skip
    if not FULL:
        in_range &= tl.arange(0, ROWS)[None, None, :] < ROWS // SIDES
        s = tl.where(in_range, s, -INFINITY)
    if V_BITS == 16:
        one = tl.full([W, N, 1], 1.0, tl.float32)
        p, _, m, total, acc = softmax_step(s, one, one, m, total, acc)
        v = load_plain(v_codes + (start.to(tl.int64) + at) * VD, at < left, VD, VDP, FULL)
        v = tl.permute(v, [0, 2, 1])
        p = p.to(v.dtype)
    else:
        v_scales += start // scales_a_load(V_SCALES)
        scale, lift = load_scales(v_scales, v_unit, left, W, N, ABREAST, ROWS, V_SCALES, FULL, ORDER)
        p, decay, m, total, acc = softmax_step(s, scale, lift, m, total, acc)
        p = for_values(p.to(DTYPE), ABREAST, ORDER)
        if ORDER == "read":
            v = v_codes + start.to(tl.int64) * (VD * V_BITS // 8)
        else:
            v = load_copied(v_tiles, batch, kv_head, start, VD, V_BITS)
        v = load_values(v, v_table, left, VD, VDP, V_BITS, V_GRID, W, N, DTYPE, FAST, FULL, ORDER, v_tiles is not None)
        if centre(V_BITS, V_GRID, tl.float32 == DTYPE) > 0:  # of the rounded weights, by the same additions
            twice = tl.full([W, 16, N], 2 * centre(V_BITS, True, False) * UNIT, DTYPE)
            sums = tl.dot(twice, p, acc=sums * decay[:, None, :], input_precision="ieee")
    return m, total, tl.dot(v, p, acc=acc, input_precision="ieee"), sums
