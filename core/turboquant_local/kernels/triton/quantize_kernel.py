"""Device code of quantisation: centre, rotate, code, correct the scale and pack, in one pass over the vectors."""

import triton
import triton.language as tl


@triton.jit
def _columns(terms, TERM: tl.constexpr, FIRST: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr):
    """Columns FIRST to FIRST + BLOCK of a term of the rotation, `[DP, BLOCK]`."""
    k = tl.arange(0, DP)[:, None]
    return tl.load(terms + TERM * DP * DP + k * DP + FIRST + tl.arange(0, BLOCK)[None, :])


@triton.jit
def _rotated(high, low, first, second, SPLIT: tl.constexpr):
    """The rotated tile, `[BT, BLOCK]`.

    The product of two float16 sums: what it leaves out is below float32's rounding. The matrix gives its columns in the
    order in which the tensor core hands out its results, so that a thread gets neighbours; here they get their names.
    """
    y = tl.dot(high, first)
    y = tl.dot(high, second, acc=y)
    if SPLIT:
        y = tl.dot(low, first, acc=y)
    y = tl.reshape(y, [high.shape[0], first.shape[1] // 8, 4, 2])
    return tl.reshape(tl.permute(y, [0, 2, 1, 3]), [high.shape[0], first.shape[1]])


@triton.jit
def _quarter(high, low, terms, FIRST: tl.constexpr, DP: tl.constexpr, SPLIT: tl.constexpr):
    """64 of 256 coordinates of the rotated tile: as much of the matrix as fits shared memory everywhere."""
    return _rotated(high, low, _columns(terms, 0, FIRST, DP, 64), _columns(terms, 1, FIRST, DP, 64), SPLIT)


@triton.jit
def _code(y, boundaries, centroids, BITS: tl.constexpr):
    """Codes of unit coordinates, and the magnitudes of their centroids.

    The codebook is symmetric: a comparison with each boundary of a magnitude. The lowest bits of a float32 centroid
    hold its number, so that one selection gives both.
    """
    if BITS <= 4:
        HALF: tl.constexpr = 2 ** (BITS - 1)
        size = tl.abs(y)
        level = tl.zeros(y.shape, tl.int32) + (tl.load(centroids + HALF).to(tl.int32, bitcast=True) & -8)
        for i in tl.static_range(1, HALF):
            numbered = (tl.load(centroids + HALF + i).to(tl.int32, bitcast=True) & -8) | i
            level = tl.where(size > tl.load(boundaries + HALF - 1 + i), numbered, level)
        code = ((level & 7) + HALF) ^ tl.where(y > 0, 0, 2 * HALF - 1)
        level = level.to(tl.float32, bitcast=True)
    else:
        code = tl.zeros(y.shape, tl.int32)
        for step in tl.static_range(BITS):
            middle = code + 2 ** (BITS - 1 - step)
            code = tl.where(y > tl.load(boundaries + middle - 1), middle, code)
        level = tl.abs(tl.load(centroids + code))
    return code, level


@triton.jit
def _joined(parts, PER: tl.constexpr, BT: tl.constexpr, DP: tl.constexpr):
    """Sums of PER neighbours, which share no bits."""
    return tl.sum(tl.reshape(parts, [BT, DP // PER, PER]), 2)


@triton.jit
def _store_plane(at, part, shown, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr):
    """Store codes of 8 / WIDTH a byte, the first in the lowest bits."""
    PER: tl.constexpr = 8 // WIDTH
    slot = tl.arange(0, DP)[None, :] % PER
    byte = _joined(part << (slot * WIDTH), PER, BT, DP) if PER > 1 else part
    element = tl.arange(0, DP // PER)[None, :]
    tl.store(at + element, byte.to(tl.uint8), mask=shown & (element < D // PER))


@triton.jit
def _store_codes(codes, row, code, shown, BITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr):
    """Pack a tile of codes as from `_code` in the bit order of `codec.packing`; `row` is `[BT, 1]`."""
    at = codes + row * (D * BITS // 8)
    channel = tl.arange(0, DP)[None, :]
    if BITS == 3:
        slot = channel % 8
        spread = (code & 1) | ((code & 2) << 7) | ((code & 4) << 14)
        part = tl.where(slot < 6, code << (4 * slot), spread << (3 + 4 * (slot - 6)))
        word = _joined(part, 8, BT, DP)
        element = tl.arange(0, DP // 8)[None, :]
        for plane in tl.static_range(3):
            byte = (word >> (8 * plane)) & 255
            tl.store(at + plane * (D // 8) + element, byte.to(tl.uint8), mask=shown & (element < D // 8))
    elif BITS > 4 and BITS < 8:
        _store_plane(at, code & 15, shown, 4, D, DP, BT)
        if BITS == 5:
            _store_plane(at + D // 2, code >> 4, shown, 1, D, DP, BT)
        else:
            _store_plane(at + D // 2, (code >> 4) & 3, shown, 2, D, DP, BT)
        if BITS == 7:
            _store_plane(at + D // 2 + D // 4, code >> 6, shown, 1, D, DP, BT)
    else:
        _store_plane(at, code, shown, BITS, D, DP, BT)


@triton.jit(do_not_specialize=["pairs", "tokens", "heads"])
def quantize_tiles(
    x, mean, terms, boundaries, centroids, codes, scales,
    pairs, tokens, heads, stride_b, stride_h, stride_t, unit,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, SCALE: tl.constexpr, MEAN: tl.constexpr,
    SPLIT: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Quantise tiles of BT vectors, every `num_programs`-th.

    Args:
        x: Vectors at `stride_b`, `stride_h`, `stride_t`.
        mean: `[pairs, D]` to subtract, or anything where MEAN is false.
        terms: `[2, DP, DP]` float16, the transposed rotation over `unit` as a sum; see `quantize._terms`.
        boundaries: `[2**BITS - 1]` float32.
        centroids: `[2**BITS]` float32.
        codes: Out, `[pairs, tokens, D * BITS / 8]` uint8.
        scales: Out, `[pairs, tokens]` float32.
        pairs: Batch times heads.
        tokens: Vectors of a pair.
        heads: Heads.
        stride_b: Of the batch.
        stride_h: Of the heads.
        stride_t: Of the tokens.
        unit: What the product with `terms` is to be multiplied by.
        D: Size of a vector.
        DP: The next power of 2.
        BITS: 1 to 8.
        SCALE: Kind of scale, as in `MSEQuantizer`.
        MEAN: Whether there is a mean.
        SPLIT: Whether a centred vector needs more than float16's 11 bits.
        BT: Vectors of a tile.
    """
    BLOCK: tl.constexpr = DP if DP <= 128 else 64
    channel = tl.arange(0, DP)[None, :]
    per_pair = tl.cdiv(tokens, BT)
    if DP == BLOCK:  # small enough to stay in shared memory
        first = _columns(terms, 0, 0, DP, BLOCK)
        second = _columns(terms, 1, 0, DP, BLOCK)
    for tile in tl.range(tl.program_id(0), pairs * per_pair, tl.num_programs(0), num_stages=1):
        pair = tile // per_pair
        token = tile % per_pair * BT + tl.arange(0, BT)[:, None]
        shown = token < tokens
        source = x + (pair // heads).to(tl.int64) * stride_b + (pair % heads).to(tl.int64) * stride_h
        v = tl.load(source + token.to(tl.int64) * stride_t + channel, mask=shown & (channel < D), other=0.0)
        v = v.to(tl.float32)
        if MEAN:
            k = tl.arange(0, DP)
            v -= tl.load(mean + pair * D + k, mask=k < D, other=0.0).to(tl.float32)[None, :]
        # A power of two brings every vector into float16's range; its exponent is that of the largest coordinate.
        top = tl.max(tl.abs(v), 1).to(tl.int32, bitcast=True) >> 23
        exponent = tl.minimum(tl.maximum(top, 1), 253)
        v *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
        high = v.to(tl.float16)
        low = (v - high.to(tl.float32)).to(tl.float16)
        if DP == BLOCK:
            y = _rotated(high, low, first, second, SPLIT)
        else:
            y = tl.join(
                tl.join(_quarter(high, low, terms, 0, DP, SPLIT), _quarter(high, low, terms, 64, DP, SPLIT)),
                tl.join(_quarter(high, low, terms, 128, DP, SPLIT), _quarter(high, low, terms, 192, DP, SPLIT)),
            )
            y = tl.reshape(tl.permute(y, [0, 3, 2, 1]), [BT, DP])
        norm = tl.sqrt(tl.sum(y * y, 1))
        y *= (1.0 / tl.maximum(norm, 1e-30))[:, None]
        code, level = _code(y, boundaries, centroids, BITS)
        if D < DP:
            level = tl.where(channel < D, level, 0.0)
        scale = norm * unit * (exponent << 23).to(tl.float32, bitcast=True)
        if SCALE == "unbiased":
            scale /= tl.where(norm > 0, tl.sum(tl.abs(y) * level, 1), 1.0)
        elif SCALE == "least_error":
            scale = scale * tl.sum(tl.abs(y) * level, 1) / tl.sum(level * level, 1)
        row = pair.to(tl.int64) * tokens + token.to(tl.int64)
        _store_codes(codes, row, code, shown, BITS, D, DP, BT)
        tl.store(scales + row, scale[:, None], mask=shown)
