"""Device code that packs codes into bytes and takes them out again, in the bit order of `codec.packing`.

And scales likewise, see `codec.scales`.
"""

import triton
import triton.language as tl

from turboquant_local.codec.scales import STEPS_PER_OCTAVE, UNIT_CODE

_STEPS = tl.constexpr(STEPS_PER_OCTAVE)
_UNIT = tl.constexpr(UNIT_CODE)
_LEAST = tl.constexpr(2.0 ** ((1 - UNIT_CODE) / STEPS_PER_OCTAVE) / 2)
"""In units: what is smaller is stored as 0."""


@triton.jit
def _joined(parts, PER: tl.constexpr):
    """Sums of PER neighbours, which share no bits."""
    return tl.sum(tl.reshape(parts, [parts.shape[0], parts.shape[1] // PER, PER]), 2)


@triton.jit
def _store_plane(at, part, shown, WIDTH: tl.constexpr, D: tl.constexpr):
    """Store codes of 8 / WIDTH a byte, the first in the lowest bits."""
    PER: tl.constexpr = 8 // WIDTH
    DP: tl.constexpr = part.shape[1]
    slot = tl.arange(0, DP)[None, :] % PER
    byte = _joined(part << (slot * WIDTH), PER) if PER > 1 else part
    element = tl.arange(0, DP // PER)[None, :]
    tl.store(at + element, byte.to(tl.uint8), mask=shown & (element < D // PER))


@triton.jit
def store_codes(at, code, shown, BITS: tl.constexpr, D: tl.constexpr):
    """Pack a tile of codes and store it.

    Args:
        at: `[tokens, 1]` pointers to the first byte of each vector.
        code: `[tokens, channels]` int32; channels from D on are left out.
        shown: `[tokens, 1]`: which vectors to store.
        BITS: 1 to 8.
        D: Size of a vector.
    """
    DP: tl.constexpr = code.shape[1]
    if BITS == 3:
        slot = tl.arange(0, DP)[None, :] % 8
        spread = (code & 1) | ((code & 2) << 7) | ((code & 4) << 14)
        word = _joined(tl.where(slot < 6, code << (4 * slot), spread << (3 + 4 * (slot - 6))), 8)
        element = tl.arange(0, DP // 8)[None, :]
        for plane in tl.static_range(3):
            byte = (word >> (8 * plane)) & 255
            tl.store(at + plane * (D // 8) + element, byte.to(tl.uint8), mask=shown & (element < D // 8))
    elif BITS < 5 or BITS == 8:
        _store_plane(at, code, shown, BITS, D)
    else:
        _store_plane(at, code & 15, shown, 4, D)
        if BITS == 5:
            _store_plane(at + D // 2, code >> 4, shown, 1, D)
        else:
            _store_plane(at + D // 2, (code >> 4) & 3, shown, 2, D)
        if BITS == 7:
            _store_plane(at + D // 2 + D // 4, code >> 6, shown, 1, D)


@triton.jit
def _of_three_planes(x, y, z, SLOT: tl.constexpr):
    """The code of a slot of three-bit codes."""
    if SLOT < 6:
        plane = x if SLOT < 2 else (y if SLOT < 4 else z)
        code = (plane >> (4 * (SLOT % 2))) & 7
    else:
        BIT: tl.constexpr = 3 + 4 * (SLOT % 2)
        code = ((x >> BIT) & 1) | (((y >> BIT) & 1) << 1) | (((z >> BIT) & 1) << 2)
    return code


@triton.jit
def _in_turn(a, b, c, d):
    """Four tiles of slots as `[..., 2, 2]`, so that flattened they alternate."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def load_codes(at, shown, BITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """The inverse of `store_codes` for 1, 2, 3, 4, 6 and 8 bits: `[tokens, DP]` int32, 0 where nothing lies.

    A thread keeps the neighbours that come out of one element.
    """
    SLOTS: tl.constexpr = 8 if BITS == 3 else (4 if BITS == 6 else 8 // BITS)
    element = tl.arange(0, DP // SLOTS)[None, :]
    inside = shown & (element < D // SLOTS)
    if BITS == 6:
        x = tl.load(at.to(tl.pointer_type(tl.uint16), bitcast=True) + element, mask=inside, other=0).to(tl.int32)
        y = tl.load(at + D // 2 + element, mask=inside, other=0).to(tl.int32)
        code = _in_turn(
            (x & 15) | ((y & 3) << 4),
            ((x >> 4) & 15) | ((y & 12) << 2),
            ((x >> 8) & 15) | (y & 48),
            (x >> 12) | ((y & 192) >> 2),
        )
    else:
        x = tl.load(at + element, mask=inside, other=0).to(tl.int32)
        if BITS == 8:
            code = x
        elif BITS == 4:
            code = tl.join(x & 15, x >> 4)
        elif BITS == 2:
            code = _in_turn(x & 3, (x >> 2) & 3, (x >> 4) & 3, x >> 6)
        elif BITS == 1:
            code = tl.join(
                _in_turn(x & 1, (x >> 2) & 1, (x >> 4) & 1, (x >> 6) & 1),
                _in_turn((x >> 1) & 1, (x >> 3) & 1, (x >> 5) & 1, x >> 7),
            )
        else:
            y = tl.load(at + D // 8 + element, mask=inside, other=0).to(tl.int32)
            z = tl.load(at + D // 4 + element, mask=inside, other=0).to(tl.int32)
            code = tl.join(
                _in_turn(
                    _of_three_planes(x, y, z, 0), _of_three_planes(x, y, z, 2),
                    _of_three_planes(x, y, z, 4), _of_three_planes(x, y, z, 6),
                ),
                _in_turn(
                    _of_three_planes(x, y, z, 1), _of_three_planes(x, y, z, 3),
                    _of_three_planes(x, y, z, 5), _of_three_planes(x, y, z, 7),
                ),
            )  # fmt: skip
    return tl.reshape(code, [at.shape[0], DP])


@triton.jit
def rounded_scales(scale):
    """The nearest scales, by ratio, that 8 bits can stand for; 0 stays."""
    steps = tl.floor(tl.log2(tl.maximum(scale, 1e-37)) * _STEPS + 0.5)
    return tl.where(scale > 0, tl.exp2(steps / _STEPS), 0.0)


@triton.jit
def store_scales(at, scale, unit, shown):
    """Store scales in 8 bits, where `at` points to bytes, else in float16."""
    if at.dtype.element_ty == tl.uint8:
        share = scale / unit
        code = tl.floor(tl.log2(tl.maximum(share, _LEAST)) * _STEPS + (_UNIT + 0.5))
        tl.store(at, tl.where(share < _LEAST, 0.0, tl.clamp(code, 1.0, 255.0)).to(tl.uint8), mask=shown)
    else:
        tl.store(at, tl.minimum(scale, 65504.0).to(tl.float16), mask=shown)


@triton.jit
def load_scales(at, unit, shown):
    """The inverse of `store_scales`, in float32."""
    if at.dtype.element_ty == tl.uint8:
        code = tl.load(at, mask=shown, other=0).to(tl.float32)
        scale = tl.where(code > 0, unit * tl.exp2((code - _UNIT) / _STEPS), 0.0)
    else:
        scale = tl.load(at, mask=shown, other=0.0).to(tl.float32)
    return scale
