"""Tiles of keys, values and queries as the tensor core wants them: device functions.

Keys and values are the left operands of their products (S^T = K Q^T, O^T = V^T P^T): a tile of 8 columns then serves
up to 8 queries. Every warp has tokens of its own, as the first dimension W of a batched product. The reshapes and
permutes change no result: they name tokens and channels in the order in which the registers of a loaded tile already
lie for the tensor core, so that decoded codes need not move.
"""

import triton
import triton.language as tl

from turboquant_local.codec.scales import STEPS_PER_OCTAVE, UNIT_CODE
from turboquant_local.kernels.triton.codes import levels, slots
from turboquant_local.kernels.triton.copied_tiles import copied_elements
from turboquant_local.kernels.triton.token_order import by_rows

_STEPS, _UNIT_CODE = tl.constexpr(STEPS_PER_OCTAVE), tl.constexpr(UNIT_CODE)


@triton.constexpr_function
def run(bits: int, padded: int) -> int:
    """Neighbours in the inner dimension of the left operand that lie in one lane, as the compiler lays it out.

    It takes 32 bits over half the width of the loaded elements.
    """
    return 8 if bits in (1, 6) or (bits == 3 and padded < 128) else 4


@triton.jit
def key_channels(D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """Channel of every entry of a `load_keys` tile's last dimension, D for padding."""
    S: tl.constexpr = slots(BITS, DP)
    IN_LANE: tl.constexpr = DP // S // 4
    V: tl.constexpr = min(run(BITS, DP), IN_LANE)
    U: tl.constexpr = min(run(BITS, DP) // V, S)
    at = tl.arange(0, DP)
    element = at // (V * U) % 4 * IN_LANE + at // (V * U * 4) % (IN_LANE // V) * V + at % V
    slot = at // (DP // S * U) * U + at // V % U
    return tl.where(element < D // S, S * element + slot, D)


@triton.jit
def value_channels(at, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, COPIED: tl.constexpr):
    """Channel of entry `at` of a `load_values` tile's channel dimension, D for padding."""
    S: tl.constexpr = slots(BITS, DP)
    if BITS == 16:
        channel = tl.where(at < D, at, D)
    else:
        element = at % (DP // S) if COPIED else at % 8 * (DP // S // 8) + at // 8 % (DP // S // 8)
        channel = tl.where(element < D // S, S * element + at // (DP // S), D)
    return channel


@triton.jit
def _load_plane(
    plane, left, PITCH: tl.constexpr, REAL: tl.constexpr, C: tl.constexpr, MOST: tl.constexpr,
    W: tl.constexpr, R: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Elements of one plane, `[4, 8, W, R, C]`; see `_load`.

    A warp's tokens are one dimension with their elements, so a warp reads neighbouring bytes, and shared memory holds
    them in the same order. PITCH is the distance of tokens, MOST how many elements a thread reads at once.
    """
    w = tl.arange(0, W)[:, None, None]
    r = tl.arange(0, R)[None, :, None]
    at = tl.arange(0, 32 * C)[None, None, :]
    offset = at if PITCH == C else at // C * PITCH + tl.max_contiguous(at % C, [1, 1, MOST])
    pointer = plane + offset + (r * W + w) * (32 * PITCH)
    if FULL and REAL == C:
        x = tl.load(pointer)
    else:
        inside = (at % C < REAL) & (True if FULL else (r * W + w) * 32 + at // C < left)
        x = tl.load(pointer, mask=inside, other=0)
    return tl.permute(tl.reshape(x, [W, R, 8, 4, C]), [3, 2, 0, 1, 4])


@triton.jit
def _load(
    codes, left,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, R: tl.constexpr, FULL: tl.constexpr,
    ORDER: tl.constexpr,
):  # fmt: skip
    """Packed elements of a tile's tokens `[4, 8, W, R, elements]`; of 3 bits the three planes, of 6 bits the two.

    Entry (t, p, w, r) is token 32(rW + w) + 4p + t.
    """
    S: tl.constexpr = slots(BITS, DP)
    C: tl.constexpr = DP // S
    REAL: tl.constexpr = D // S
    WIDE: tl.constexpr = BITS * S % 16 == 0 or BITS == 6
    PITCH: tl.constexpr = D * BITS // (16 if WIDE else 8)
    # 16 bytes a thread, which go past L1. Of planes, which share sectors, 8: L1 keeps them for the next. Six-bit codes'
    # second plane is read as their first, or the compiler would give a thread 32 bytes of that.
    MOST: tl.constexpr = C if BITS != 3 else (4 if WIDE else 8)
    if ORDER != "read":
        x, y, z = copied_elements(codes, D, BITS, W, R)
    else:
        first = codes.to(tl.pointer_type(tl.uint16), bitcast=True) if WIDE else codes
        x = _load_plane(first, left, PITCH, REAL, C, MOST, W, R, FULL)
        y = x
        z = x
        if BITS == 6:
            y = _load_plane(codes + D // 2, left, D * BITS // 8, REAL, C, 8, W, R, FULL)
        if BITS == 3:
            y = _load_plane(first + REAL, left, PITCH, REAL, C, MOST, W, R, FULL)
            z = _load_plane(first + 2 * REAL, left, PITCH, REAL, C, MOST, W, R, FULL)
    return x, y, z


@triton.jit
def load_keys(
    codes, table, left,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, GRID: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr, FAST: tl.constexpr, FULL: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Decode a tile of packed keys: `[W, BN, DP]`, tokens as in `token_of`, channels as in `key_channels`.

    A warp reads 8 tokens by 4 lanes. Of an entry's place in the channel dimension the lowest bits (see `run`) are one
    lane's registers and the next two the lane, as the tensor core's left operand has them.
    """
    S: tl.constexpr = slots(BITS, DP)
    C: tl.constexpr = DP // S
    V: tl.constexpr = min(run(BITS, DP), C // 4)
    U: tl.constexpr = min(run(BITS, DP) // V, S)
    R: tl.constexpr = BN // 32
    a, b, c = _load(codes, left, D, DP, BITS, W, R, FULL, ORDER)
    x = levels(a, b, c, table, BITS, S, GRID, DTYPE, FAST)
    x = tl.reshape(x, [4, 2, 2, 2, W, R, 4, C // 4 // V, V, S // U, U])
    if ORDER == "read":
        x = tl.permute(x, [4, 5, 0, 1, 2, 3, 9, 7, 6, 10, 8])
    else:
        x = tl.permute(x, [4, 5, 0, 1, 3, 2, 9, 7, 6, 10, 8])
    return tl.reshape(x, [W, BN, DP])


@triton.jit
def load_values(
    codes, table, left,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, GRID: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr, FAST: tl.constexpr, FULL: tl.constexpr, ORDER: tl.constexpr,
    COPIED: tl.constexpr,
):  # fmt: skip
    """Decode a tile of packed values, transposed: `[W, DP, BN]`, channels as in `value_channels`.

    Here a warp reads 4 tokens by 8 lanes: channels are the rows of the left operand, tokens its inner dimension.
    """
    S: tl.constexpr = slots(BITS, DP)
    C: tl.constexpr = DP // S
    R: tl.constexpr = BN // 32
    a, b, c = _load(codes, left, D, DP, BITS, W, R, FULL, ORDER)
    x = levels(a, b, c, table, BITS, S, GRID, DTYPE, FAST)
    if ORDER == "thirds":
        x = tl.permute(tl.reshape(x, [2, 2, 2, 2, 2, W, R, C, S]), [5, 8, 7, 6, 0, 4, 3, 1, 2])
    elif ORDER == "copied":
        x = tl.permute(tl.reshape(x, [2, 2, 2, 2, 2, W, R, C, S]), [5, 8, 7, 6, 2, 4, 0, 3, 1])
    elif COPIED:
        x = tl.permute(tl.reshape(x, [4, 8, W, R, C, S]), [2, 5, 4, 3, 0, 1])
    else:
        x = tl.permute(tl.reshape(x, [4, 8, W, R, 8, C // 8, S]), [2, 6, 5, 4, 3, 0, 1])
    return tl.reshape(x, [W, DP, BN])


@triton.constexpr_function
def scales_a_load(layout: str) -> int:
    """Scales that one load of `load_scales` takes."""
    return {"half": 1, "halves": 2, "byte": 1, "bytes": 4}[layout]


@triton.jit
def _from_byte(x, unit):
    """An 8-bit scale (see `kernels.layout`), for a unit given as its logarithm, and the scale's logarithm."""
    log = x.to(tl.float32) * (1 / _STEPS) + (unit - _UNIT_CODE / _STEPS)
    return tl.where(x == 0, 0.0, tl.exp2(log)), log


@triton.jit
def _rounded_log(x):
    """The logarithm (base 2) of a float16 held as float32, rounded up, -24 for 0."""
    return tl.maximum(((x.to(tl.int32, bitcast=True) >> 23) - 126).to(tl.float32), -24.0)


@triton.jit
def load_scales(
    scales, unit, left,
    W: tl.constexpr, BN: tl.constexpr, SIDES: tl.constexpr, ROWS: tl.constexpr, LAYOUT: tl.constexpr,
    FULL: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Scales of a tile's tokens in float32, 0 from token `left` on, and their logarithms but for 1; as `by_rows`.

    Args:
        scales: Pointer to the tile's first scale: float16 ("half") or uint8 ("byte"), or int32 where two ("halves")
            or four ("bytes") are read at a time. Only loads of 4 bytes or more can run ahead of their use.
        unit: Logarithm (base 2) of the unit of 8-bit scales.
        left: Tokens from there on.
        W: Warps.
        BN: Tokens a warp.
        SIDES: 1, or 2 for sides; see `token_order`, as for ROWS and ORDER.
        ROWS: Columns of the scores.
        LAYOUT: "half", "halves", "byte" or "bytes".
        FULL: Whether all tokens are left of `left`.
        ORDER: Which tokens.
    """
    R: tl.constexpr = BN // 32
    r = tl.arange(0, R)[:, None, None, None]
    w = tl.arange(0, W)[None, :, None, None]
    p = tl.arange(0, 8)[None, None, :, None]
    # quads of tokens, `[R, W, 8, 1]`; of thirds p's bits are those of g in reverse
    at = w * 16 + (p % 2 * 4 + p // 2 % 2 * 2 + p // 4) * 2 + r if ORDER == "thirds" else (r * W + w) * 8 + p
    if LAYOUT == "bytes":
        word = tl.load(scales + at) if FULL else tl.load(scales + at, mask=at * 4 < left, other=0)
        low = tl.join(word & 255, (word >> 16) & 255)
        high = tl.join((word >> 8) & 255, (word >> 24) & 255)
        x, log = _from_byte(tl.reshape(tl.join(low, high), [R, W, 8, 4]), unit)
    elif LAYOUT == "halves":
        pair = at * 2 + tl.arange(0, 2)[None, None, None, :]
        both = tl.load(scales + pair) if FULL else tl.load(scales + pair, mask=pair * 2 < left, other=0)
        low = both.to(tl.int16).to(tl.float16, bitcast=True)
        high = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        x = tl.reshape(tl.join(low, high), [R, W, 8, 4]).to(tl.float32)
        if not FULL:  # a word's second scale may be that of a token not in use: any bits
            x = tl.where(at * 4 + tl.arange(0, 4)[None, None, None, :] < left, x, 0.0)
        log = _rounded_log(x)
    else:
        one = at * 4 + tl.arange(0, 4)[None, None, None, :]
        x = tl.load(scales + one) if FULL else tl.load(scales + one, mask=one < left, other=0)
        if LAYOUT == "byte":
            x, log = _from_byte(x, unit)
        else:
            x = x.to(tl.float32)
            log = _rounded_log(x)
    return by_rows(x, SIDES, ROWS, ORDER), by_rows(log, SIDES, ROWS, ORDER)


@triton.jit
def load_plain(rows, shown, D: tl.constexpr, DP: tl.constexpr, FULL: tl.constexpr):
    """Vectors kept in 16 or 32 bits, `[W, BN, DP]`, 0 where not `shown` (FULL: all are); `rows` point to them."""
    channel = tl.arange(0, DP)[None, None, :]
    # Vectors begin at multiples of 16 bytes, which newer compilers do not see of pointers chosen from two.
    at = tl.max_contiguous(tl.multiple_of(rows[:, :, None] + channel, (1, 1, 16)), (1, 1, DP))
    if FULL and D == DP:
        x = tl.load(at)
    elif FULL:
        x = tl.load(at, mask=channel < D, other=0.0)
    else:
        x = tl.load(at, mask=shown[:, :, None] & (channel < D), other=0.0)
    return x


@triton.jit
def load_queries(q, row, valid, channels, D: tl.constexpr, W: tl.constexpr):
    """Queries as the right operand, one copy a warp: `[W, channels, ROWS]`."""
    at = q + row[None, :] * D + channels[:, None]
    x = tl.load(at, mask=valid[None, :] & (channels < D)[:, None], other=0.0)
    return tl.broadcast_to(x[None, :, :], [W, channels.shape[0], row.shape[0]])
