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

_STEPS, _UNIT_CODE = tl.constexpr(STEPS_PER_OCTAVE), tl.constexpr(UNIT_CODE)


@triton.jit
def token_of(w, row, W: tl.constexpr):
    """Which token of a tile row `row` of warp `w` is: a row is 32r + 8t + p, its token 32(rW + w) + 4p + t."""
    return (row // 32 * W + w) * 32 + row % 8 * 4 + row // 8 % 4


@triton.jit
def key_channels(D: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr):
    """Channel of every entry of a `load_keys` tile's last dimension, D for padding."""
    S: tl.constexpr = slots(BITS)
    IN_LANE: tl.constexpr = C // 4
    V: tl.constexpr = min(8, IN_LANE)
    U: tl.constexpr = min(8 // V, S)
    at = tl.arange(0, C * S)
    element = at // (V * U) % 4 * IN_LANE + at // (V * U * 4) % (IN_LANE // V) * V + at % V
    slot = at // (C * U) * U + at // V % U
    return tl.where(element < D // S, S * element + slot, D)


@triton.jit
def value_channels(D: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr):
    """Channel of every entry of a `load_values` tile's channel dimension, D for padding."""
    at = tl.arange(0, C * slots(BITS))
    element = at % 8 * (C // 8) + at // 8 % (C // 8)
    return tl.where(element < D // slots(BITS), slots(BITS) * element + at // C, D)


@triton.jit
def _load_elements(at, token, element, left, REAL: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    if FULL and REAL == C:
        x = tl.load(at + element)
    elif FULL:
        x = tl.load(at + element, mask=element < REAL, other=0)
    else:
        x = tl.load(at + element, mask=(token < left) & (element < REAL), other=0)
    return x


@triton.jit
def _load(codes, token, element, left, D: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    """Packed elements of some tokens; of 3 bits the three planes, of 6 bits the two."""
    REAL: tl.constexpr = D // slots(BITS)
    at = codes + token * (D * BITS // 8)
    first = at
    if BITS == 4 or BITS == 6:
        first = at.to(tl.pointer_type(tl.uint16), bitcast=True)
    x = _load_elements(first, token, element, left, REAL, C, FULL)
    y = x
    z = x
    if BITS == 6:
        y = _load_elements(at + D // 2, token, element, left, REAL, C, FULL)
    if BITS == 3:
        y = _load_elements(at + REAL, token, element, left, REAL, C, FULL)
        z = _load_elements(at + 2 * REAL, token, element, left, REAL, C, FULL)
    return x, y, z


@triton.jit
def load_keys(
    codes, table, left,
    D: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Decode a tile of packed keys: `[W, BN, C * slots]`, tokens as in `token_of`, channels as in `key_channels`.

    A warp reads 8 tokens by 4 lanes. Of an entry's place in the channel dimension the lowest three bits are one
    lane's registers and the next two the lane, as the tensor core's left operand has them.
    """
    S: tl.constexpr = slots(BITS)
    V: tl.constexpr = min(8, C // 4)
    U: tl.constexpr = min(8 // V, S)
    R: tl.constexpr = BN // 32
    r = tl.arange(0, R)[:, None, None, None, None]
    w = tl.arange(0, W)[None, :, None, None, None]
    t = tl.arange(0, 4)[None, None, :, None, None]
    p = tl.arange(0, 8)[None, None, None, :, None]
    element = tl.arange(0, C)[None, None, None, None, :]
    a, b, c = _load(codes, (r * W + w) * 32 + 4 * p + t, element, left, D, BITS, C, FULL)
    x = levels(a, b, c, table, BITS, DTYPE, ASM)
    x = tl.reshape(x, [R, W, 32, 4, C // 4 // V, V, S // U, U])
    return tl.reshape(tl.permute(x, [1, 0, 2, 6, 4, 3, 7, 5]), [W, BN, C * S])


@triton.jit
def load_values(
    codes, table, left,
    D: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Decode a tile of packed values, transposed: `[W, C * slots, BN]`, channels as in `value_channels`.

    Here a warp reads 4 tokens by 8 lanes: channels are the rows of the left operand, tokens its inner dimension.
    """
    R: tl.constexpr = BN // 32
    r = tl.arange(0, R)[:, None, None, None, None]
    w = tl.arange(0, W)[None, :, None, None, None]
    p = tl.arange(0, 8)[None, None, :, None, None]
    t = tl.arange(0, 4)[None, None, None, :, None]
    element = tl.arange(0, C)[None, None, None, None, :]
    a, b, c = _load(codes, (r * W + w) * 32 + 4 * p + t, element, left, D, BITS, C, FULL)
    x = levels(a, b, c, table, BITS, DTYPE, ASM)
    x = tl.reshape(x, [R, W, 8, 4, 8, C // 8, slots(BITS)])
    return tl.reshape(tl.permute(x, [1, 6, 5, 4, 0, 3, 2]), [W, C * slots(BITS), BN])


@triton.constexpr_function
def scales_a_load(layout: str) -> int:
    """Scales that one load of `load_scales` takes."""
    return {"half": 1, "halves": 2, "byte": 1, "bytes": 4}[layout]


@triton.jit
def _from_byte(x, unit):
    """An 8-bit scale (see `kernels.layout`), for a unit given as its logarithm."""
    return tl.where(x == 0, 0.0, tl.exp2((x.to(tl.float32) - _UNIT_CODE) * (1 / _STEPS) + unit))


@triton.jit
def load_scales(scales, unit, left, W: tl.constexpr, BN: tl.constexpr, LAYOUT: tl.constexpr, FULL: tl.constexpr):
    """Scales of a tile's tokens in float32, `[W, BN]`; 0 from token `left` on.

    Args:
        scales: Pointer to the tile's first scale: float16 ("half") or uint8 ("byte"), or int32 where two ("halves")
            or four ("bytes") are read at a time. Only loads of 4 bytes or more can run ahead of their use.
        unit: Logarithm (base 2) of the unit of 8-bit scales.
        left: Tokens from there on.
        W: Warps.
        BN: Tokens a warp.
        LAYOUT: "half", "halves", "byte" or "bytes".
        FULL: Whether all tokens are left of `left`.
    """
    R: tl.constexpr = BN // 32
    r = tl.arange(0, R)[:, None, None, None]
    w = tl.arange(0, W)[None, :, None, None]
    p = tl.arange(0, 8)[None, None, :, None]
    if LAYOUT == "bytes":
        at = (r * W + w) * 8 + p
        word = tl.load(scales + at) if FULL else tl.load(scales + at, mask=at * 4 < left, other=0)
        low = tl.join(word & 255, (word >> 16) & 255)
        high = tl.join((word >> 8) & 255, (word >> 24) & 255)
        x = _from_byte(tl.reshape(tl.join(low, high), [R, W, 8, 4]), unit)
    elif LAYOUT == "halves":
        at = (r * W + w) * 16 + p * 2 + tl.arange(0, 2)[None, None, None, :]
        both = tl.load(scales + at) if FULL else tl.load(scales + at, mask=at * 2 < left, other=0)
        low = both.to(tl.int16).to(tl.float16, bitcast=True)
        high = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        x = tl.reshape(tl.join(low, high), [R, W, 8, 4]).to(tl.float32)
        if not FULL:  # a word's second scale may be that of a token not in use: any bits
            x = tl.where((r * W + w) * 32 + p * 4 + tl.arange(0, 4)[None, None, None, :] < left, x, 0.0)
    else:
        at = (r * W + w) * 32 + p * 4 + tl.arange(0, 4)[None, None, None, :]
        x = tl.load(scales + at) if FULL else tl.load(scales + at, mask=at < left, other=0)
        x = _from_byte(x, unit) if LAYOUT == "byte" else x.to(tl.float32)
    return tl.reshape(tl.permute(x, [1, 0, 3, 2]), [W, BN])


@triton.jit
def load_plain(rows, shown, D: tl.constexpr, DP: tl.constexpr, FULL: tl.constexpr):
    """Vectors kept in 16 or 32 bits, `[W, BN, DP]`, 0 where not `shown` (FULL: all are); `rows` point to them."""
    channel = tl.arange(0, DP)[None, None, :]
    if FULL and D == DP:
        x = tl.load(rows[:, :, None] + channel)
    elif FULL:
        x = tl.load(rows[:, :, None] + channel, mask=channel < D, other=0.0)
    else:
        x = tl.load(rows[:, :, None] + channel, mask=shown[:, :, None] & (channel < D), other=0.0)
    return x


@triton.jit
def load_queries(q, row, valid, channels, D: tl.constexpr, W: tl.constexpr):
    """Queries as the right operand, one copy a warp: `[W, channels, ROWS]`."""
    at = q + row[None, :] * D + channels[:, None]
    x = tl.load(at, mask=valid[None, :] & (channels < D)[:, None], other=0.0)
    return tl.broadcast_to(x[None, :, :], [W, channels.shape[0], row.shape[0]])
