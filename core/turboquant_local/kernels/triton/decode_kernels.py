"""Device code of decode attention: attend to a share of the tokens.

Every warp keeps a softmax of its own over its own tokens, so warps meet only once, at the end of a share.
"""

import triton
import triton.language as tl

from turboquant_local.kernels.triton.codes import slots
from turboquant_local.kernels.triton.tiles import (
    key_channels,
    load_keys,
    load_plain,
    load_queries,
    load_scales,
    load_values,
    scales_a_load,
    token_of,
    value_channels,
)

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _visible(
    s, position, kv_length, mask, head, token, in_range, stride_mh, stride_mq, stride_mk, softcap,
    Q_LENGTH: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Cap and mask a tile of scores `[W, BN, ROWS]`; afterwards they are in base 2."""
    if SOFTCAP:
        x = s / softcap
        e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
        s = tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e) * softcap * LOG2E
    if CAUSAL:
        s = tl.where(position[:, :, None] > kv_length - Q_LENGTH + token[None, None, :], -INFINITY, s)
    if MASK != "none":
        row_at = head.to(tl.int64) * stride_mh + token * stride_mq
        at = mask + row_at[None, None, :] + position[:, :, None].to(tl.int64) * stride_mk
        shown = tl.load(at, mask=in_range[:, :, None], other=0)
        if MASK == "bool":
            s = tl.where(shown != 0, s, -INFINITY)
        else:  # the lowest float32 must not overflow on its way to base 2
            s += tl.where(shown == -INFINITY, -INFINITY, tl.maximum(shown.to(tl.float32), -2e38) * LOG2E)
    return s


@triton.jit
def _softmax(s, scale, m, total, acc):
    """One step of the running softmax of every warp.

    Args:
        s: Scores `[W, BN, ROWS]` in base 2.
        scale: What the tokens' values are to be multiplied by, `[W, BN]`, not negative.
        m: Running maximum of score times scale, `[W, ROWS]`, up to a factor of 2: so the weights fit float16 whatever
            the scales are.
        total: Running sum of the exponentials, one for every register, `[W, BN, ROWS]`.
        acc: Running sum of the values, `[W, VD, ROWS]`.

    Returns:
        Weights `[W, BN, ROWS]`, scale included, and the three running quantities.
    """
    lift = ((scale.to(tl.int32, bitcast=True) >> 23) - 126).to(tl.float32)  # log2, rounded up
    new = tl.maximum(m, tl.max(s + tl.maximum(lift, -24.0)[:, :, None], 1))
    base = tl.where(new == -INFINITY, 0.0, new)
    decay = tl.exp2(m - base)
    weights = tl.exp2(s - base[:, None, :])
    total = total * decay[:, None, :] + weights
    return weights * scale[:, :, None], new, total, acc * decay[:, None, :]


@triton.jit
def _finish(m, total, acc, channels, out, lse, at, valid, D: tl.constexpr):
    """Merge the warps' results, and store the mean value and the logarithm (base 2) of the sum."""
    top = tl.max(m, 0)
    top = tl.where(top == -INFINITY, 0.0, top)
    share = tl.exp2(m - top[None, :])
    mass = tl.sum(tl.sum(total, 1) * share, 0)
    seen = mass > 0
    mass = tl.where(seen, mass, 1.0)
    x = tl.sum(acc * share[:, None, :], 0) / mass[None, :]
    tl.store(out + at[None, :] * D + channels[:, None], x, mask=valid[None, :] & (channels < D)[:, None])
    tl.store(lse + at, tl.where(seen, top + tl.log2(mass), -INFINITY), mask=valid)


@triton.jit
def _sinks_and_recent(
    q, k_sinks, k_recent, v_sinks, v_recent, mask,
    row, valid, head, token, sinks, recent, kv_length, factor, softcap,
    stride_mh, stride_mq, stride_mk, m, total, acc,
    KD: tl.constexpr, KDP: tl.constexpr, VD: tl.constexpr, VDP: tl.constexpr, Q_LENGTH: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The tokens that are not packed: the first and the last of all."""
    query = load_queries(q, row, valid, tl.arange(0, KDP), KD, W)
    k_recent -= sinks * KD
    v_recent -= sinks * VD
    for start in tl.range(0, sinks + recent, W * BN, num_stages=1):
        local = start + tl.arange(0, W)[:, None] * BN + tl.arange(0, BN)[None, :]
        in_range = local < sinks + recent
        is_sink = local < sinks
        keys = load_plain(tl.where(is_sink, k_sinks, k_recent) + local * KD, in_range, KD, KDP, False)
        values = load_plain(tl.where(is_sink, v_sinks, v_recent) + local * VD, in_range, VD, VDP, False)
        s = tl.dot(keys, query, input_precision="ieee") * factor
        s = _visible(
            s, tl.where(is_sink, local, local + kv_length - sinks - recent), kv_length, mask, head, token, in_range,
            stride_mh, stride_mq, stride_mk, softcap, Q_LENGTH, MASK, CAUSAL, SOFTCAP,
        )  # fmt: skip
        s = tl.where(in_range[:, :, None], s, -INFINITY)
        p, m, total, acc = _softmax(s, tl.full([W, BN], 1.0, tl.float32), m, total, acc)
        values = tl.permute(values, [0, 2, 1])
        acc = tl.dot(values, p.to(values.dtype), acc=acc, input_precision="ieee")
    return m, total, acc


@triton.jit
def _packed_tile(
    k_codes, k_scales, k_unit, k_table, v_codes, v_scales, v_unit, v_table, mask,
    query, coefficient, constant, head, token, start, packed, position, kv_length, factor, softcap,
    stride_mh, stride_mq, stride_mk, m, total, acc,
    KD: tl.constexpr, KDP: tl.constexpr, VD: tl.constexpr, VDP: tl.constexpr, Q_LENGTH: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_ASM: tl.constexpr, V_ASM: tl.constexpr, MEAN: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, K_SCALES: tl.constexpr, V_SCALES: tl.constexpr,
    W: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """One tile of packed tokens, of which `FULL` says that none lies behind the last."""
    left = packed - start
    local = token_of(tl.arange(0, W)[:, None], tl.arange(0, BN)[None, :], W)
    in_range = local < left
    if K_BITS == 16:
        k = load_plain(k_codes + (start.to(tl.int64) + local) * KD, in_range, KD, KDP, FULL)
        s = tl.dot(k, query, input_precision="ieee") * factor
    else:
        k_scale = load_scales(k_scales + start // scales_a_load(K_SCALES), k_unit, left, W, BN, K_SCALES, FULL)
        k_at = k_codes + start.to(tl.int64) * (KD * K_BITS // 8)
        k = load_keys(k_at, k_table, left, KD, K_BITS, KDP // slots(K_BITS), W, BN, DTYPE, K_ASM, FULL)
        s = tl.dot(k, query, input_precision="ieee") * k_scale[:, :, None] * coefficient[None, None, :]
    if MEAN:
        s += constant[None, None, :]
    s = _visible(
        s, position + start + local, kv_length, mask, head, token, in_range,
        stride_mh, stride_mq, stride_mk, softcap, Q_LENGTH, MASK, CAUSAL, SOFTCAP,
    )  # fmt: skip
    if not FULL:
        s = tl.where(in_range[:, :, None], s, -INFINITY)
    if V_BITS == 16:
        p, m, total, acc = _softmax(s, tl.full([W, BN], 1.0, tl.float32), m, total, acc)
        v = load_plain(v_codes + (start.to(tl.int64) + local) * VD, in_range, VD, VDP, FULL)
        v = tl.permute(v, [0, 2, 1])
    else:
        scale = load_scales(v_scales + start // scales_a_load(V_SCALES), v_unit, left, W, BN, V_SCALES, FULL)
        p, m, total, acc = _softmax(s, scale, m, total, acc)
        v_at = v_codes + start.to(tl.int64) * (VD * V_BITS // 8)
        v = load_values(v_at, v_table, left, VD, V_BITS, VDP // slots(V_BITS), W, BN, DTYPE, V_ASM, FULL)
    return m, total, tl.dot(v, p.to(v.dtype), acc=acc, input_precision="ieee")


_RUN_TIME = ["sinks_stride", "packed", "recent_stride", "position", "kv_length", "first_share", "shares"] + [
    f"{name}_stride_{of}" for name, dims in (("ks", "bh"), ("vs", "bh"), ("mask", "bhqk")) for of in dims
]
"""Integers whose value must not decide which variant is compiled."""


@triton.jit(do_not_specialize=_RUN_TIME)
def partials(
    q, q_code, q_coefficient, q_offset,
    k_sinks, k_recent, v_sinks, v_recent,
    k_codes, k_scales, k_units, k_table, v_codes, v_scales, v_units, v_table,
    mask, lengths, out, lse,
    k_stride_b, k_stride_h, ks_stride_b, ks_stride_h, v_stride_b, v_stride_h, vs_stride_b, vs_stride_h,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    sinks_stride, packed, recent_stride, position, kv_length, first_share, shares, factor, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, Q_LENGTH: tl.constexpr, ROWS: tl.constexpr,
    KD: tl.constexpr, KDP: tl.constexpr, VD: tl.constexpr, VDP: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_ASM: tl.constexpr, V_ASM: tl.constexpr, MEAN: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, PLAIN: tl.constexpr,
    PART: tl.constexpr,
    K_SCALES: tl.constexpr, V_SCALES: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to one share of one KV head's tokens, for up to ROWS of its queries.

    The packed tokens are one stretch of the whole, the `position`-th of all first, cut into shares of equally many
    tiles. With PLAIN there is one share more, the first: sinks and recent window. Other stretches have calls of their
    own, which write to the same `out` and `lse` from `first_share` on. With PART, the tokens in use and the
    position are read from `lengths`, of which this stretch is number PART (1 or 2). A share without tokens gives -inf.

    Arguments as in `decode_attention.attention`; `out` is `[rows, shares, VD]`, in the space of the values' codes but
    for the plain share, and `lse` `[rows, shares]`.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch = pair // KV_HEADS
    kv_head = pair % KV_HEADS
    sinks = sinks_stride
    recent = recent_stride
    if PART > 0:
        sinks = tl.load(lengths)
        recent = tl.load(lengths + 3)
        packed = tl.load(lengths + PART)
        position = sinks + (tl.load(lengths + 1) if PART == 2 else 0)
        kv_length = sinks + tl.load(lengths + 1) + tl.load(lengths + 2) + recent
    in_group = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    valid = in_group < GROUP * Q_LENGTH
    row = pair * (GROUP * Q_LENGTH) + tl.where(valid, in_group, 0)
    token = tl.where(valid, in_group, 0) % Q_LENGTH
    head = kv_head * GROUP + tl.where(valid, in_group, 0) // Q_LENGTH
    mask += batch * mask_stride_b
    at = row * shares + first_share + tl.program_id(1)
    m = tl.full([W, ROWS], -INFINITY, tl.float32)
    total = tl.zeros([W, BN, ROWS], tl.float32)
    acc = tl.zeros([W, VDP, ROWS], tl.float32)
    stretch = tl.program_id(1) - (1 if PLAIN else 0)
    if PLAIN and stretch < 0:
        m, total, acc = _sinks_and_recent(
            q, k_sinks + pair * sinks_stride * KD, k_recent + pair * recent_stride * KD,
            v_sinks + pair * sinks_stride * VD, v_recent + pair * recent_stride * VD, mask,
            row, valid, head, token, sinks, recent, kv_length, factor, softcap,
            mask_stride_h, mask_stride_q, mask_stride_k, m, total, acc,
            KD, KDP, VD, VDP, Q_LENGTH, MASK, CAUSAL, SOFTCAP, W, BN,
        )  # fmt: skip
        _finish(m, total, acc, tl.arange(0, VDP), out, lse, at, valid, VD)
    else:
        k_codes += batch * k_stride_b + kv_head * k_stride_h
        v_codes += batch * v_stride_b + kv_head * v_stride_h
        k_scales += batch * ks_stride_b + kv_head * ks_stride_h
        v_scales += batch * vs_stride_b + kv_head * vs_stride_h
        dtype: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float32 else tl.float16
        coefficient = tl.full([ROWS], 0.0, tl.float32)
        constant = coefficient
        if K_BITS == 16:
            query = load_queries(q, row, valid, tl.arange(0, KDP), KD, W)
        else:
            query = load_queries(q_code, row, valid, key_channels(KD, K_BITS, KDP // slots(K_BITS)), KD, W)
            coefficient = tl.load(q_coefficient + row) * factor
        if MEAN:
            constant = tl.load(q_offset + row) * factor
        k_unit = tl.log2(tl.load(k_units + pair)) if K_SCALES == "byte" or K_SCALES == "bytes" else 0.0
        v_unit = tl.log2(tl.load(v_units + pair)) if V_SCALES == "byte" or V_SCALES == "bytes" else 0.0
        split_tiles = tl.cdiv(tl.cdiv(packed, W * BN), tl.num_programs(1) - (1 if PLAIN else 0))
        first = stretch * split_tiles * (W * BN)
        end = tl.minimum(first + split_tiles * (W * BN), packed)
        whole = (end - first) // (W * BN) * (W * BN)
        for step in tl.range(0, whole, W * BN, num_stages=STAGES):
            m, total, acc = _packed_tile(
                k_codes, k_scales, k_unit, k_table, v_codes, v_scales, v_unit, v_table, mask,
                query, coefficient, constant, head, token, first + step, packed, position, kv_length, factor, softcap,
                mask_stride_h, mask_stride_q, mask_stride_k, m, total, acc,
                KD, KDP, VD, VDP, Q_LENGTH, K_BITS, V_BITS, K_ASM, V_ASM, MEAN,
                MASK, CAUSAL, SOFTCAP, K_SCALES, V_SCALES, W, BN, dtype, True,
            )  # fmt: skip
        for step in tl.range(whole, end - first, W * BN, num_stages=1):
            m, total, acc = _packed_tile(
                k_codes, k_scales, k_unit, k_table, v_codes, v_scales, v_unit, v_table, mask,
                query, coefficient, constant, head, token, first + step, packed, position, kv_length, factor, softcap,
                mask_stride_h, mask_stride_q, mask_stride_k, m, total, acc,
                KD, KDP, VD, VDP, Q_LENGTH, K_BITS, V_BITS, K_ASM, V_ASM, MEAN,
                MASK, CAUSAL, SOFTCAP, K_SCALES, V_SCALES, W, BN, dtype, False,
            )  # fmt: skip
        channels = tl.arange(0, VDP) if V_BITS == 16 else value_channels(VD, V_BITS, VDP // slots(V_BITS))
        _finish(m, total, acc, channels, out, lse, at, valid, VD)
