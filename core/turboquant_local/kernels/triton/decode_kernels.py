"""Device code of decode attention: attend to a share of the tokens, and merge the shares when all are done."""

import triton
import triton.language as tl

from turboquant_local.kernels.triton.codes import UNIT, centre, lowered, spacing
from turboquant_local.kernels.triton.early import ask_for, let_next_start, wait
from turboquant_local.kernels.triton.packed_tile import packed_tile
from turboquant_local.kernels.triton.queries import QUERY_LIFT, gather, merge, rotated, rotation_block
from turboquant_local.kernels.triton.softmax import INFINITY, finish, softmax_step, visible
from turboquant_local.kernels.triton.tiles import key_channels, load_plain, load_queries, value_channels
from turboquant_local.kernels.triton.token_order import split_sides


@triton.jit
def _sinks_and_recent(
    q, k_sinks, k_recent, v_sinks, v_recent, mask,
    row, valid, present, head, token, sinks, recent, kv_length, factor, softcap,
    stride_mh, stride_mq, stride_mk, out, lse,
    KD: tl.constexpr, KDP: tl.constexpr, VD: tl.constexpr, VDP: tl.constexpr, NR: tl.constexpr, Q_LENGTH: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The tokens that are not packed: the first and the last of all."""
    wait(EARLY)
    ROWS: tl.constexpr = row.shape[0]
    m = tl.full([W, ROWS], -INFINITY, tl.float32)
    total = tl.zeros([W, BN, ROWS], tl.float32)
    acc = tl.zeros([W, VDP, ROWS], tl.float32)
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
        s = visible(
            s, tl.where(is_sink, local, local + kv_length - sinks - recent)[:, :, None], kv_length, mask, head, token,
            in_range[:, :, None], stride_mh, stride_mq, stride_mk, softcap, Q_LENGTH, MASK, CAUSAL, SOFTCAP,
        )  # fmt: skip
        s = tl.where(in_range[:, :, None], s, -INFINITY)
        one = tl.full([W, BN, 1], 1.0, tl.float32)
        p, _, m, total, acc = softmax_step(s, one, one, m, total, acc)
        values = tl.permute(values, [0, 2, 1])
        acc = tl.dot(values, p.to(values.dtype), acc=acc, input_precision="ieee")
    no_sums = tl.zeros([W, ROWS], tl.float32)
    plain = tl.full([VDP], 1.0, tl.float32)
    column = tl.arange(0, ROWS)
    finish(m, total, acc, no_sums, plain, 1.0, tl.arange(0, VDP), out, lse, column, column < present, VDP, NR)


@triton.jit
def _packed(
    q, k_rotation, mean, part, k_tiles, v_tiles, strides, mask,
    pair, batch, kv_head, row, valid, present, head, token, first, end, packed, position, kv_length, factor, softcap,
    stride_mh, stride_mq, stride_mk, out, lse,
    KD: tl.constexpr, KDP: tl.constexpr, VD: tl.constexpr, VDP: tl.constexpr, NR: tl.constexpr, Q_LENGTH: tl.constexpr,
    KIND: tl.constexpr, MEAN: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    W: tl.constexpr, BN: tl.constexpr, SIDES: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
    K_TERMS: tl.constexpr, Q_TERMS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Packed tokens `first` to `end` of a part; see `attend`."""
    K_BITS: tl.constexpr = KIND[0]
    K_GRID: tl.constexpr = KIND[1]
    K_SCALES: tl.constexpr = KIND[2]
    V_BITS: tl.constexpr = KIND[3]
    V_GRID: tl.constexpr = KIND[4]
    V_SCALES: tl.constexpr = KIND[5]
    k_codes, k_scales, k_units, k_table, v_codes, v_scales, v_units, v_table = part
    k_stride_b, k_stride_h, ks_stride_b, ks_stride_h, v_stride_b, v_stride_h, vs_stride_b, vs_stride_h = strides
    k_codes += (batch * k_stride_b + kv_head * k_stride_h) * (KD if K_BITS == 16 else KD * K_BITS // 8)
    v_codes += (batch * v_stride_b + kv_head * v_stride_h) * (VD if V_BITS == 16 else VD * V_BITS // 8)
    k_scales += batch * ks_stride_b + kv_head * ks_stride_h
    v_scales += batch * vs_stride_b + kv_head * vs_stride_h
    ask_for(k_codes, first, end, KD * K_BITS // 8, W * BN, EARLY)
    ask_for(v_codes, first, end, VD * V_BITS // 8, W * BN, EARLY)
    if K_BITS < 16:
        channels = key_channels(KD, KDP, K_BITS)
        turn = rotation_block(k_rotation, channels, 0, KD, COLUMNS)
    k_step = spacing(k_table, K_BITS) if K_GRID else 1.0
    v_step = spacing(v_table, V_BITS) / UNIT if V_GRID else 1.0
    wait(EARLY)
    k_unit = tl.log2(tl.load(k_units + pair)) if K_SCALES == "byte" or K_SCALES == "bytes" else 0.0
    v_unit = tl.log2(tl.load(v_units + pair)) if V_SCALES == "byte" or V_SCALES == "bytes" else 0.0
    dtype: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float32 else tl.float16
    ROWS: tl.constexpr = row.shape[0]
    coefficient = tl.full([ROWS], 0.0, tl.float32)
    constant = coefficient
    middle = coefficient
    m = tl.full([W, ROWS], -INFINITY, tl.float32)
    total = tl.zeros([W, BN, ROWS], tl.float32)
    acc = tl.zeros([W, VDP, ROWS], tl.float32)
    sums = tl.zeros([W, 16, ROWS], tl.float32)
    if K_BITS == 16:
        query = load_queries(q, row, valid, tl.arange(0, KDP), KD, W)
    else:
        x, norm, constant = rotated(
            q, k_rotation, turn, mean + pair * KD, row, valid, channels, KD, KDP, MEAN, K_TERMS, Q_TERMS, COLUMNS
        )
        constant *= factor
        coefficient = norm * (factor / QUERY_LIFT)
        x *= QUERY_LIFT
        if K_GRID:
            low = lowered(channels, K_BITS)
            coefficient *= k_step
            x = (x * low[:, None]).to(dtype)
            if centre(K_BITS, True, dtype == tl.float32) > 0:  # of the rounded query
                up = (tl.zeros([16, 1], tl.float32) + (1 / low)[None, :]).to(dtype)  # a sum as a product: see `rotated`
                middle = tl.max(tl.dot(up, x, input_precision="ieee"), 0) * coefficient * centre(K_BITS, True, False)
            coefficient /= UNIT
        query = tl.broadcast_to(x.to(dtype)[None, :, :], [W, KDP, ROWS])
    whole = (end - first) // (W * BN * SIDES) * (W * BN * SIDES)
    for step in tl.range(0, whole, W * BN * SIDES, num_stages=STAGES):
        m, total, acc, sums = packed_tile(
            k_codes, k_scales, k_unit, k_table, v_codes, v_scales, v_unit, v_table, mask,
            k_tiles, v_tiles, batch, kv_head, query, coefficient, constant, middle, head, token, first + step, packed,
            position, kv_length, factor, softcap, stride_mh, stride_mq, stride_mk, m, total, acc, sums,
            KD, KDP, VD, VDP, Q_LENGTH, K_BITS, V_BITS, K_GRID, V_GRID, MEAN,
            MASK, CAUSAL, SOFTCAP, K_SCALES, V_SCALES, W, BN, SIDES, dtype, FAST, True,
        )  # fmt: skip
    for step in tl.range(whole, end - first, W * BN, num_stages=1):
        m, total, acc, sums = packed_tile(
            k_codes, k_scales, k_unit, k_table, v_codes, v_scales, v_unit, v_table, mask,
            k_tiles, v_tiles, batch, kv_head, query, coefficient, constant, middle, head, token, first + step, packed,
            position, kv_length, factor, softcap, stride_mh, stride_mq, stride_mk, m, total, acc, sums,
            KD, KDP, VD, VDP, Q_LENGTH, K_BITS, V_BITS, K_GRID, V_GRID, MEAN,
            MASK, CAUSAL, SOFTCAP, K_SCALES, V_SCALES, W, BN, SIDES, dtype, FAST, False,
        )  # fmt: skip
    at = value_channels(tl.arange(0, VDP), VD, VDP, V_BITS, v_tiles is not None)
    place = tl.where(at < VD, at, -1)
    low = lowered(at, V_BITS) if V_GRID else tl.full([VDP], 1.0, tl.float32)
    sums = tl.max(sums, 1) / 2
    if SIDES == 2:
        m, total, acc, sums = split_sides(m), split_sides(total), split_sides(acc), split_sides(sums)
    column = tl.arange(0, ROWS // SIDES)
    finish(m, total, acc, sums, low, v_step, place, out, lse, column, column < present, VDP, NR)


STRIDES = ("k_b", "k_h", "k_scales_b", "k_scales_h", "v_b", "v_h", "v_scales_b", "v_scales_h")
NUMBERS = (
    *("far_" + name for name in STRIDES), *("near_" + name for name in STRIDES), "mask_b", "mask_h", "mask_q", "mask_k",
    "sinks", "far_length", "near_length", "recent", "near_shares", "apart", "other_tiles",
)  # fmt: skip
"""Arguments of `attend` of which no value is special, or it would be compiled anew as tokens grow; so no tuples."""


@triton.jit(do_not_specialize=NUMBERS)
def attend(
    q, k_rotation, mean, plain, far, near, k_tiles, v_tiles, mask, lengths, out, lse, done, sink_logits, v_rotation,
    result,
    far_k_b, far_k_h, far_k_scales_b, far_k_scales_h, far_v_b, far_v_h, far_v_scales_b, far_v_scales_h,
    near_k_b, near_k_h, near_k_scales_b, near_k_scales_h, near_v_b, near_v_h, near_v_scales_b, near_v_scales_h,
    mask_b, mask_h, mask_q, mask_k, sinks, far_length, near_length, recent, near_shares, apart, other_tiles,
    factor, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, Q_LENGTH: tl.constexpr, ROWS: tl.constexpr, NR: tl.constexpr,
    KD: tl.constexpr, KDP: tl.constexpr, VD: tl.constexpr, VDP: tl.constexpr,
    FAR: tl.constexpr, NEAR: tl.constexpr, MEAN: tl.constexpr, LENGTHS: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    K_TERMS: tl.constexpr, V_TERMS: tl.constexpr, Q_TERMS: tl.constexpr, SINK: tl.constexpr,
    W: tl.constexpr, BN: tl.constexpr, SIDES: tl.constexpr, STAGES: tl.constexpr,
    FAST: tl.constexpr, COLUMNS: tl.constexpr, BRANCH: tl.constexpr, SHARES: tl.constexpr, AGAIN: tl.constexpr,
    V_COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attend to one share of one KV head's tokens, for up to ROWS of its queries.

    The first share are sinks and recent window, the next `near_shares` the near tokens, the others the far ones. The
    first two kinds have the first programs: to themselves with `apart`, which is how many these are; with 0 these take
    far tokens as well, fewer than the other programs do. A share without tokens gives -inf. The program that is done
    last merges all shares of its queries; with BRANCH, so many programs with far tokens first have theirs merged by the
    last of them. `done` counts, 0 before and after.

    Arguments as in `decode_attention.attention`. `plain` are keys and values of sinks and window; `far` and `near` are
    codes, scales, units and table of keys, and the same of values; strides are those of codes (in vectors) and scales
    over batch and heads. FAR and NEAR are bits, whether the codebook is a grid, and how scales are read, of keys and of
    values, or None if there is no such part. `lengths` are the tokens in use of sinks, far, near and recent on the
    device, read with LENGTHS: then the numbers of that name are capacities.
    `out` is `[batch * KV_HEADS, chunks, shares, NR, VDP]`, but for the first share in the space of the values' codes,
    with those of branches before those of far tokens; `lse` is the same without VDP.
    """
    let_next_start(EARLY)
    pair = tl.program_id(0).to(tl.int64)
    batch = pair // KV_HEADS
    kv_head = pair % KV_HEADS
    k_sinks, k_recent, v_sinks, v_recent = plain
    k_sinks += pair * sinks * KD
    v_sinks += pair * sinks * VD
    k_recent += pair * recent * KD
    v_recent += pair * recent * VD
    if LENGTHS:
        sinks = tl.load(lengths)
        far_length = tl.load(lengths + 1)
        near_length = tl.load(lengths + 2)
        recent = tl.load(lengths + 3)
    kv_length = sinks + far_length + near_length + recent
    present = tl.minimum(GROUP * Q_LENGTH - tl.program_id(2) * ROWS, NR)
    in_group = tl.program_id(2) * ROWS + tl.arange(0, ROWS) % (ROWS // SIDES)
    valid = in_group < GROUP * Q_LENGTH
    row = pair * (GROUP * Q_LENGTH) + tl.where(valid, in_group, 0)
    token = tl.where(valid, in_group, 0) % Q_LENGTH
    head = kv_head * GROUP + tl.where(valid, in_group, 0) // Q_LENGTH
    mask += batch * mask_b
    program = tl.program_id(1)
    others = 1 + near_shares
    sharing = tl.num_programs(1) - apart  # programs with far tokens
    branches = tl.cdiv(sharing, BRANCH) if BRANCH > 0 else 0
    shares = others + branches + sharing
    number = pair * tl.num_programs(2) + tl.program_id(2)
    lse += number * shares * NR
    out += number * shares * (VDP * NR)
    KIND: tl.constexpr = NEAR if FAR is None else FAR
    V_BITS: tl.constexpr = KIND[3]
    ask_for(k_rotation, 0, KD, KD * k_rotation.dtype.element_ty.primitive_bitwidth // 8, KD, EARLY and KIND[0] < 16)
    ask_for(v_rotation, 0, VDP, VDP * v_rotation.dtype.element_ty.primitive_bitwidth // 8, VDP, EARLY and V_BITS < 16)
    if program == 0:
        _sinks_and_recent(
            q, k_sinks, k_recent, v_sinks, v_recent, mask,
            row, valid, present, head, token, sinks, recent, kv_length, factor, softcap,
            mask_h, mask_q, mask_k, out, lse,
            KD, KDP, VD, VDP, NR, Q_LENGTH, MASK, CAUSAL, SOFTCAP, W, BN, EARLY,
        )  # fmt: skip
    if NEAR is not None and program > 0 and program < others:
        strides = (
            near_k_b, near_k_h, near_k_scales_b, near_k_scales_h, near_v_b, near_v_h, near_v_scales_b, near_v_scales_h
        )  # fmt: skip
        tiles = tl.cdiv(tl.cdiv(near_length, W * BN), near_shares) * (W * BN)
        first = (program - 1) * tiles
        _packed(
            q, k_rotation, mean, near, None, None, strides, mask,
            pair, batch, kv_head, row, valid, present, head, token, first, tl.minimum(first + tiles, near_length),
            near_length, sinks + far_length, kv_length, factor, softcap, mask_h, mask_q, mask_k,
            out + program * (VDP * NR), lse + program * NR,
            KD, KDP, VD, VDP, NR, Q_LENGTH, NEAR, MEAN, MASK, CAUSAL, SOFTCAP, W, BN, 1, 1, FAST,
            K_TERMS, Q_TERMS, COLUMNS, EARLY,
        )  # fmt: skip
    if FAR is not None and program >= apart:
        strides = far_k_b, far_k_h, far_k_scales_b, far_k_scales_h, far_v_b, far_v_h, far_v_scales_b, far_v_scales_h
        TILE: tl.constexpr = W * BN * SIDES
        share = program - apart
        loaded = others - apart
        most = tl.cdiv(tl.cdiv(far_length, TILE) + loaded * other_tiles, sharing)
        fewer = tl.maximum(most - other_tiles, 0)
        first = (tl.minimum(share, loaded) * fewer + tl.maximum(share - loaded, 0) * most) * TILE
        end = tl.minimum(first + tl.where(share < loaded, fewer, most) * TILE, far_length)
        _packed(
            q, k_rotation, mean, far, k_tiles, v_tiles, strides, mask,
            pair, batch, kv_head, row, valid, present, head, token, first, end,
            far_length, sinks, kv_length, factor, softcap, mask_h, mask_q, mask_k,
            out + (others + branches + share) * (VDP * NR), lse + (others + branches + share) * NR,
            KD, KDP, VD, VDP, NR, Q_LENGTH, FAR, MEAN, MASK, CAUSAL, SOFTCAP, W, BN, SIDES, STAGES, FAST,
            K_TERMS, Q_TERMS, COLUMNS, EARLY,
        )  # fmt: skip
    tl.debug_barrier()
    arrived = done + number * (1 + branches)
    waited_for = apart + branches if BRANCH > 0 else tl.num_programs(1)
    if BRANCH > 0 and program >= apart:
        branch = (program - apart) // BRANCH
        first = branch * BRANCH
        end = tl.minimum(first + BRANCH, sharing)
        last = tl.atomic_add(arrived + 1 + branch, 1, sem="acq_rel") == end - first - 1
        if last:
            tl.store(arrived + 1 + branch, 0)
            gather(
                out, lse, others + branches + first, others + branches + end, others + branch, present,
                VD, VDP, NR, W, BRANCH,
            )  # fmt: skip
            tl.debug_barrier()
    else:
        last = True
    if last:  # noqa: SIM102 (here `and` computes both)
        if tl.atomic_add(arrived, 1, sem="acq_rel") == waited_for - 1:
            tl.store(arrived, 0)
            merge(
                out, lse, sink_logits, v_rotation, result, others + branches if BRANCH > 0 else shares,
                pair * (GROUP * Q_LENGTH) + tl.program_id(2) * ROWS,
                kv_head * (GROUP * Q_LENGTH) + tl.program_id(2) * ROWS,
                present, VD, VDP, NR, V_BITS == 16, Q_LENGTH, SINK, V_TERMS, W, SHARES, AGAIN, V_COLUMNS,
            )  # fmt: skip
