"""Device code of decode attention: attend to a share of the tokens.

Every warp keeps a softmax of its own over its own tokens, so warps meet only once, at the end of a share.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboquant_local.kernels.triton.codes import slots
from turboquant_local.kernels.triton.tiles import (
    key_channels,
    load_keys,
    load_plain,
    load_queries,
    load_scales,
    load_values,
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
    pair, row, valid, head, token, sinks, packed, recent, factor, softcap,
    stride_mh, stride_mq, stride_mk, m, total, acc,
    KD: tl.constexpr, KDP: tl.constexpr, VD: tl.constexpr, VDP: tl.constexpr, Q_LENGTH: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The tokens that are not packed."""
    w = tl.arange(0, W)[:, None]
    b = tl.arange(0, BN)[None, :]
    query = load_queries(q, row, valid, tl.arange(0, KDP), KD, W)
    for part in tl.range(0, 2, num_stages=1):
        is_sink = part == 0
        count = tl.where(is_sink, sinks, recent)
        first = tl.where(is_sink, 0, sinks + packed)
        keys = tl.where(is_sink, k_sinks, k_recent) + pair * count * KD
        values = tl.where(is_sink, v_sinks, v_recent) + pair * count * VD
        for start in tl.range(0, count, W * BN, num_stages=1):
            local = start + w * BN + b
            in_range = local < count
            local = tl.minimum(local, count - 1)
            s = tl.dot(load_plain(keys + local * KD, KD, KDP), query, input_precision="ieee") * factor
            s = _visible(
                s, first + local, sinks + packed + recent, mask, head, token, in_range, stride_mh, stride_mq, stride_mk,
                softcap, Q_LENGTH, MASK, CAUSAL, SOFTCAP,
            )  # fmt: skip
            s = tl.where(in_range[:, :, None], s, -INFINITY)
            p, m, total, acc = _softmax(s, tl.full([W, BN], 1.0, tl.float32), m, total, acc)
            v = tl.permute(load_plain(values + local * VD, VD, VDP), [0, 2, 1])
            acc = tl.dot(v, p.to(v.dtype), acc=acc, input_precision="ieee")
    return m, total, acc


_RUN_TIME = ["sinks", "packed", "recent", "split_tiles"] + [
    f"{name}_stride_{of}" for name, dims in (("ks", "bh"), ("vs", "bh"), ("mask", "bhqk")) for of in dims
]
"""Integers whose value must not decide which variant is compiled."""


@triton.jit(do_not_specialize=_RUN_TIME)
def partials(
    q, q_code, q_coefficient, q_offset,
    k_sinks, k_recent, v_sinks, v_recent,
    k_codes, k_scales, k_table, v_codes, v_scales, v_table,
    mask, out, lse,
    k_stride_b, k_stride_h, ks_stride_b, ks_stride_h, v_stride_b, v_stride_h, vs_stride_b, vs_stride_h,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    sinks, packed, recent, split_tiles, factor, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, Q_LENGTH: tl.constexpr, ROWS: tl.constexpr,
    KD: tl.constexpr, KDP: tl.constexpr, VD: tl.constexpr, VDP: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_ASM: tl.constexpr, V_ASM: tl.constexpr, MEAN: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, PAIRS: tl.constexpr,
    W: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attend to one share of one KV head's tokens, for up to ROWS of its queries.

    Share 0 is the sinks and the recent window, the others are `split_tiles` tiles of packed tokens each. Arguments as
    in `decode_attention.attention`; `out` is `[rows, shares, VD]`, in the space of the values' codes but for share 0,
    and `lse` `[rows, shares]`. With OVERLAP it may have started beside `prepare`, and lets `combine` do so.
    """
    if OVERLAP:
        gdc_launch_dependents()
    pair = tl.program_id(0)
    share = tl.program_id(1)
    batch = (pair // KV_HEADS).to(tl.int64)
    kv_head = (pair % KV_HEADS).to(tl.int64)
    in_group = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    valid = in_group < GROUP * Q_LENGTH
    row = pair.to(tl.int64) * (GROUP * Q_LENGTH) + tl.where(valid, in_group, 0)
    token = tl.where(valid, in_group, 0) % Q_LENGTH
    head = kv_head * GROUP + tl.where(valid, in_group, 0) // Q_LENGTH
    mask += batch * mask_stride_b
    kv_length = sinks + packed + recent
    at = row * tl.num_programs(1) + share
    w = tl.arange(0, W)[:, None]
    b = tl.arange(0, BN)[None, :]
    m = tl.full([W, ROWS], -INFINITY, tl.float32)
    total = tl.zeros([W, BN, ROWS], tl.float32)
    acc = tl.zeros([W, VDP, ROWS], tl.float32)
    if OVERLAP:
        gdc_wait()
    if share == 0:
        m, total, acc = _sinks_and_recent(
            q, k_sinks, k_recent, v_sinks, v_recent, mask,
            pair.to(tl.int64), row, valid, head, token, sinks, packed, recent, factor, softcap,
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
        K_C: tl.constexpr = KDP // slots(K_BITS)
        V_C: tl.constexpr = VDP // slots(V_BITS)
        if K_BITS == 16:
            query = load_queries(q, row, valid, tl.arange(0, KDP), KD, W)
        else:
            query = load_queries(q_code, row, valid, key_channels(KD, K_BITS, K_C), KD, W)
            coefficient = tl.load(q_coefficient + row) * factor
        if MEAN:
            constant = tl.load(q_offset + row) * factor
        local = token_of(w, b, W)
        PER_SCALE: tl.constexpr = 2 if PAIRS else 1
        first = (share - 1) * split_tiles * (W * BN)
        end = tl.minimum(first + split_tiles * (W * BN), packed)
        for step in tl.range(0, end - first, W * BN, num_stages=STAGES):
            start = first + step
            left = packed - start
            in_range = local < left
            if K_BITS == 16:
                k = load_plain(k_codes + (start.to(tl.int64) + tl.minimum(local, left - 1)) * KD, KD, KDP)
                s = tl.dot(k, query, input_precision="ieee") * factor
            else:
                k_scale = load_scales(k_scales + start // PER_SCALE, left, W, BN, PAIRS)
                k_at = k_codes + start.to(tl.int64) * (KD * K_BITS // 8)
                k = load_keys(k_at, k_table, left - 1, KD, K_BITS, K_C, W, BN, dtype, K_ASM)
                s = tl.dot(k, query, input_precision="ieee") * k_scale[:, :, None] * coefficient[None, None, :]
            if MEAN:
                s += constant[None, None, :]
            s = _visible(
                s, sinks + start + local, kv_length, mask, head, token, in_range,
                mask_stride_h, mask_stride_q, mask_stride_k, softcap, Q_LENGTH, MASK, CAUSAL, SOFTCAP,
            )  # fmt: skip
            s = tl.where(in_range[:, :, None], s, -INFINITY)
            if V_BITS == 16:
                p, m, total, acc = _softmax(s, tl.full([W, BN], 1.0, tl.float32), m, total, acc)
                v = load_plain(v_codes + (start.to(tl.int64) + tl.minimum(local, left - 1)) * VD, VD, VDP)
                v = tl.permute(v, [0, 2, 1])
            else:
                scale = load_scales(v_scales + start // PER_SCALE, left, W, BN, PAIRS)
                p, m, total, acc = _softmax(s, scale, m, total, acc)
                v_at = v_codes + start.to(tl.int64) * (VD * V_BITS // 8)
                v = load_values(v_at, v_table, left - 1, VD, V_BITS, V_C, W, BN, dtype, V_ASM)
            acc = tl.dot(v, p.to(v.dtype), acc=acc, input_precision="ieee")
        channels = tl.arange(0, VDP) if V_BITS == 16 else value_channels(VD, V_BITS, V_C)
        _finish(m, total, acc, channels, out, lse, at, valid, VD)
