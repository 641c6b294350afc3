"""Device code of prefix attention: many query tokens over a packed prefix and over each other.

An ordinary flash attention of a block of queries, the rows of one KV head (GQA: all of its query heads, token by
token). Tiles of packed tokens are decoded on their way to the tensor core. Near tokens are brought into the order of
the far ones' channels, so that one sum of values serves both; it is rotated back once, before the tokens that are not
packed.
"""

import triton
import triton.language as tl

from turboquant_local.kernels.triton.prefix_tiles import (
    load_scales,
    load_tile,
    rotated_back,
    rotated_queries,
    tile_unit,
    vector_size,
)

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))
PLAIN = tl.constexpr((16, False, 16, False))


@triton.jit
def _visible(
    s, coefficient, constant, position, in_range, masking,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Cap and mask a tile of products `[BM, BN]`.

    With SOFTCAP or a float mask they are scores in base 2 afterwards, else still to be multiplied by `coefficient`.
    """
    rows, stride_k, last, softcap = masking
    if SOFTCAP:
        x = (s * coefficient[:, None] + constant[:, None]) / softcap
        e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
        s = tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e) * softcap * LOG2E
    if MASK != "none":
        shown = tl.load(rows[:, None] + position[None, :].to(tl.int64) * stride_k, mask=in_range[None, :], other=0)
        if MASK == "bool":
            s = tl.where(shown != 0, s, -INFINITY)
        else:  # the lowest float32 must not overflow on its way to base 2
            if not SOFTCAP:
                s *= coefficient[:, None]
            s += tl.where(shown == -INFINITY, -INFINITY, tl.maximum(shown.to(tl.float32), -2e38) * LOG2E)
    if not FULL:
        s = tl.where(in_range[None, :], s, -INFINITY)
        if CAUSAL:
            s = tl.where(position[None, :] > last[:, None], -INFINITY, s)
    return s


@triton.jit
def _softmax(s, coefficient, m, total, acc, SCALED: tl.constexpr):
    """One step of the running softmax; SCALED: `coefficient` is in the scores already.

    Returns:
        Weights, maxima in base 2, sums of the weights, and the values so far under the new maxima.
    """
    top = tl.max(s, 1)
    new = tl.maximum(m, top if SCALED else top * coefficient)
    base = tl.where(new == -INFINITY, 0.0, new)
    weights = tl.exp2((s if SCALED else s * coefficient[:, None]) - base[:, None])
    decay = tl.exp2(m - base)
    return weights, new, total * decay + tl.sum(weights, 1), acc * decay[:, None]


@triton.jit
def _loop(
    query, coefficient, constant, part, position, length, begin, end, masking, m, total, acc,
    KD: tl.constexpr, KDP: tl.constexpr, VD: tl.constexpr, VDP: tl.constexpr, KIND: tl.constexpr,
    K_ORDER: tl.constexpr, V_ORDER: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    BN: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Attend to the tiles `begin` to `end` of a part; FULL: of whole ones that all queries see."""
    k_codes, k_scales, k_unit, k_table, v_codes, v_scales, v_unit, v_table = part
    coded: tl.constexpr = tl.float32 if query.dtype == tl.float32 else tl.float16
    k_scale = load_scales(k_scales, begin * BN, length, KIND[0], BN)
    v_scale = load_scales(v_scales, begin * BN, length, KIND[2], BN)
    for tile in tl.range(begin, end, num_stages=STAGES):
        first = tile * BN
        k = load_tile(
            k_codes, k_scale, k_unit, k_table, first, length,
            KD, KDP, KIND[0], KIND[1], K_ORDER, BN, WARPS, coded, FAST, FULL,
        )  # fmt: skip
        v = load_tile(
            v_codes, v_scale, v_unit, v_table, first, length,
            VD, VDP, KIND[2], KIND[3], V_ORDER, BN, WARPS, coded, FAST, FULL,
        )  # fmt: skip
        s = tl.dot(query, tl.trans(k), input_precision="ieee")
        token = first + tl.arange(0, BN)
        s = _visible(s, coefficient, constant, position + token, token < length, masking, MASK, CAUSAL, SOFTCAP, FULL)
        p, m, total, acc = _softmax(s, coefficient, m, total, acc, SOFTCAP or MASK == "float")
        # For the next tile: the compiler runs ahead only with loads of 4 bytes and more.
        k_scale = load_scales(k_scales, first + BN, length, KIND[0], BN)
        v_scale = load_scales(v_scales, first + BN, length, KIND[2], BN)
        acc = tl.dot(p.to(v.dtype), v, acc=acc, input_precision="ieee")
    return m, total, acc


@triton.jit
def _attend(
    query, coefficient, constant, part, position, length, before, share, masking, m, total, acc,
    KD: tl.constexpr, KDP: tl.constexpr, VD: tl.constexpr, VDP: tl.constexpr, KIND: tl.constexpr,
    K_ORDER: tl.constexpr, V_ORDER: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    BN: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Attend to what a share has of a part.

    `query` is `[BM, KDP]`, in the part's space; scores in base 2 are the products times `coefficient`, `[BM]`; with
    SOFTCAP `constant` is to be added then, in base e. `part` is as in `_at_head`, `position` that of its first token in
    the whole sequence, `length` its tokens, `before` the tiles of the parts before it. `share` is the first and the
    last tile of the share, and how many tokens all queries of the block see; `masking` are pointers to the queries'
    rows of the mask, its stride, the last token each query sees, and the cap. `m`, `total` and `acc` are the maxima,
    the sums of the weights and of the values so far. LONG says that a loop without a look at every token pays.
    """
    begin, end, seen_by_all = share
    begin = tl.maximum(begin - before, 0)
    end = tl.minimum(end - before, tl.cdiv(length, BN))
    if LONG:
        full = tl.maximum(begin, tl.minimum(end, tl.maximum(tl.minimum(length, seen_by_all - position), 0) // BN))
        m, total, acc = _loop(
            query, coefficient, constant, part, position, length, begin, full, masking, m, total, acc,
            KD, KDP, VD, VDP, KIND, K_ORDER, V_ORDER, MASK, CAUSAL, SOFTCAP, BN, WARPS, STAGES, FAST, True,
        )  # fmt: skip
        begin = full
    return _loop(
        query, coefficient, constant, part, position, length, begin, end, masking, m, total, acc,
        KD, KDP, VD, VDP, KIND, K_ORDER, V_ORDER, MASK, CAUSAL, SOFTCAP, BN, WARPS, 1, FAST, False,
    )  # fmt: skip


@triton.jit
def _at_head(part, pair, vector, scale, KD: tl.constexpr, VD: tl.constexpr, KIND: tl.constexpr):
    """A part from a head's first vector and scale on: codes, scales, unit and table of keys, and the same of values."""
    k_codes, k_scales, k_units, k_table, v_codes, v_scales, v_units, v_table = part
    k_codes += vector * vector_size(KD, KIND[0])
    v_codes += vector * vector_size(VD, KIND[2])
    k_unit = tl.load(k_units + pair) if KIND[0] < 16 else 1.0
    v_unit = tl.load(v_units + pair) if KIND[2] < 16 else 1.0
    return k_codes, k_scales + scale, k_unit, k_table, v_codes, v_scales + scale, v_unit, v_table


_SIZES = [
    "q_length", "sinks", "far_length", "near_length", "recent",
    "far_codes_b", "far_codes_h", "far_scales_b", "far_scales_h",
    "near_codes_b", "near_codes_h", "near_scales_b", "near_scales_h", "mask_b", "mask_h", "mask_q", "mask_k",
]  # fmt: skip
"""Arguments whose value compiles nothing anew; in tuples they would."""


@triton.jit(do_not_specialize=_SIZES)
def attend(
    q, k_rotation, v_rotation, mean, plain, far, near, mask, sink_logits, rotated, out, lse, factor, softcap,
    q_length, sinks, far_length, near_length, recent,
    far_codes_b, far_codes_h, far_scales_b, far_scales_h, near_codes_b, near_codes_h, near_scales_b, near_scales_h,
    mask_b, mask_h, mask_q, mask_k,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, KD: tl.constexpr, KDP: tl.constexpr, VD: tl.constexpr,
    VDP: tl.constexpr, FAR: tl.constexpr, NEAR: tl.constexpr, K_ORDER: tl.constexpr, V_ORDER: tl.constexpr,
    MEAN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, SINK: tl.constexpr,
    K_TERMS: tl.constexpr, V_TERMS: tl.constexpr, Q_TERMS: tl.constexpr, SHARES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
    WARPS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Attend from a block of queries to a share of the tokens: of far, near, sinks and recent, in this order.

    Arguments as in `prefix_attention.attention`. `plain` are keys and values of sinks and window; a part is codes,
    scales, units and table of keys and the same of values, with strides of codes (in vectors) and scales over batch
    and heads; FAR and NEAR are bits, and whether the codebook is a grid, of keys and of values, or None if there is no
    such part; K_ORDER and V_ORDER name the order of the channels (`coded_channel`). `rotated` is room for the queries,
    `[batch, q_heads, q_length, KDP]`; `out` is `[SHARES, batch, q_heads, q_length, VD]`; `lse`, written where there
    are several shares, the same without VD.
    """
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // KV_HEADS
    kv_head = pair % KV_HEADS
    number = tl.program_id(2)
    kv_length = sinks + far_length + near_length + recent
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # those that see most begin first
    row = first_row + tl.arange(0, BM)
    valid = row < GROUP * q_length
    row = tl.where(valid, row, 0)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    place = (batch * (KV_HEADS * GROUP) + head) * q_length + token
    mask_rows = mask + (batch * mask_b + head * mask_h + token * mask_q.to(tl.int64))
    masking = (mask_rows, mask_k, kv_length - q_length + token, softcap)
    recent_seen = recent
    seen_by_all = kv_length
    if CAUSAL:
        recent_seen -= q_length - 1 - tl.minimum(first_row + BM - 1, GROUP * q_length - 1) // GROUP
        seen_by_all -= q_length - 1 - first_row // GROUP
    tiles = tl.cdiv(far_length, BN) + tl.cdiv(near_length, BN) + tl.cdiv(sinks, BN)
    length = tl.cdiv(tiles + tl.cdiv(tl.maximum(recent_seen, 0), BN), SHARES)
    share = (number * length, (number + 1) * length, seen_by_all)

    m = tl.full([BM], -INFINITY, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, VDP], tl.float32)
    zeros = total
    d = tl.arange(0, KDP)
    q_at = q + place[:, None] * KD + d[None, :]
    there = valid[:, None] & (d < KD)[None, :]
    K_BITS: tl.constexpr = NEAR[0] if FAR is None else FAR[0]
    V_BITS: tl.constexpr = NEAR[2] if FAR is None else FAR[2]
    norm = zeros + 1.0
    constant = zeros
    if K_BITS == 16:
        query = tl.load(q_at, mask=there, other=0.0)
    else:
        x, norm, along = rotated_queries(
            q + place * KD, valid, k_rotation, mean + pair * KD, KD, KDP, K_ORDER, MEAN, K_TERMS, Q_TERMS, COLUMNS
        )
        constant = along * factor
        query = x.to(rotated.dtype.element_ty)
        if not KEEP:  # what is loaded goes to shared memory, what is computed stays in registers
            at = rotated + place[:, None] * KDP + d[None, :]
            tl.store(at, query, mask=valid[:, None])
            tl.debug_barrier()
            query = tl.load(at, mask=valid[:, None], other=0.0)
    before = 0
    v_unit = 1.0
    if FAR is not None:
        codes = batch * far_codes_b + kv_head * far_codes_h
        part = _at_head(far, pair, codes, batch * far_scales_b + kv_head * far_scales_h, KD, VD, FAR)
        v_unit = tile_unit(part[7], part[6], FAR[2], FAR[3])
        m, total, acc = _attend(
            query, norm * (factor * tile_unit(part[3], part[2], FAR[0], FAR[1])), constant, part,
            sinks, far_length, before, share, masking, m, total, acc,
            KD, KDP, VD, VDP, FAR, K_ORDER, V_ORDER, MASK, CAUSAL, SOFTCAP, BN, WARPS, STAGES, FAST, True,
        )  # fmt: skip
        before += tl.cdiv(far_length, BN)
    if NEAR is not None:
        codes = batch * near_codes_b + kv_head * near_codes_h
        part = _at_head(near, pair, codes, batch * near_scales_b + kv_head * near_scales_h, KD, VD, NEAR)
        near_unit = tile_unit(part[7], part[6], NEAR[2], NEAR[3])
        m, total, acc = _attend(
            query, norm * (factor * tile_unit(part[3], part[2], NEAR[0], NEAR[1])), constant, part,
            sinks + far_length, near_length, before, share, masking, m, total, acc * (v_unit / near_unit),
            KD, KDP, VD, VDP, NEAR, K_ORDER, V_ORDER, MASK, CAUSAL, SOFTCAP, BN, WARPS, 1, FAST, False,
        )  # fmt: skip
        v_unit = near_unit
        before += tl.cdiv(near_length, BN)
    acc *= v_unit
    if V_BITS < 16:
        acc = rotated_back(acc, v_rotation, VD, VDP, V_ORDER, V_TERMS)
    if not SOFTCAP:  # the packed keys' mean adds the same to all their scores
        m += constant

    query = tl.load(q_at, mask=there, other=0.0)
    k_sinks, k_recent, v_sinks, v_recent = plain
    k = k_sinks + pair * sinks * KD
    v = v_sinks + pair * sinks * VD
    m, total, acc = _attend(
        query, zeros + factor, zeros, (k, k, 1.0, k, v, v, 1.0, v), 0, sinks, before, share, masking, m, total, acc,
        KD, KDP, VD, VDP, PLAIN, 1, 1, MASK, CAUSAL, SOFTCAP, BN, WARPS, 1, FAST, False,
    )  # fmt: skip
    before += tl.cdiv(sinks, BN)
    k = k_recent + pair * recent * KD
    v = v_recent + pair * recent * VD
    m, total, acc = _attend(
        query, zeros + factor, zeros, (k, k, 1.0, k, v, v, 1.0, v), kv_length - recent, recent_seen, before, share,
        masking, m, total, acc,
        KD, KDP, VD, VDP, PLAIN, 1, 1, MASK, CAUSAL, SOFTCAP, BN, WARPS, 1, FAST, True,
    )  # fmt: skip

    if SINK and number == 0:
        sink = tl.load(sink_logits + head).to(tl.float32) * LOG2E
        top = tl.maximum(m, sink)
        total = total * tl.exp2(m - top) + tl.exp2(sink - top)
        acc *= tl.exp2(m - top)[:, None]
        m = top
    sees = total > 0
    c = tl.arange(0, VDP)
    place += number * (tl.num_programs(1).to(tl.int64) * GROUP * q_length)
    acc /= tl.where(sees, total, 1.0)[:, None]
    tl.store(out + place[:, None] * VD + c[None, :], acc.to(out.dtype.element_ty), valid[:, None] & (c < VD)[None, :])
    if SHARES > 1:
        tl.store(lse + place, tl.where(sees, m + tl.log2(tl.where(sees, total, 1.0)), -INFINITY), mask=valid)
