"""Packed codes to centroids, in registers: the device functions that all operations share.

A tile of packed bytes becomes a tile of centroids with its `slots` (the codes that one byte, or one pair of planes,
holds) in the last dimensions: slot s of element g is channel `slots * g + s`.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def slots(bits: int) -> int:
    """Codes that one element of a tile holds: those of a byte, or of 24 bits for three-bit codes."""
    return 8 if bits in (1, 3) else max(8 // bits, 1)


@triton.jit
def _level(code, table, DTYPE: tl.constexpr):
    return tl.load(table + code.to(tl.int32)).to(DTYPE)


@triton.jit
def _code(low, high, SLOT: tl.constexpr, BITS: tl.constexpr):
    if BITS == 1:  # there is no second plane to read
        code = (low >> SLOT) & 1
    else:
        code = ((low >> (2 * SLOT)) & 3) | (((high.to(tl.uint16) >> SLOT) & 1) << 2)
    return code


@triton.jit
def _joined(x0, x1, x2, x3):
    return tl.join(tl.join(x0, x2), tl.join(x1, x3))


@triton.jit
def _levels_by_assembly(low, high, BITS: tl.constexpr, ASM: tl.constexpr):
    if BITS == 4:
        a, b = tl.inline_asm_elementwise(
            ASM, "=&r,=&r,=&r,=&r,r", [low], (tl.float16, tl.float16), is_pure=True, pack=4
        )
        x = tl.join(a, b)
    elif BITS == 2:
        a, b, c, d = tl.inline_asm_elementwise(
            ASM,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [low],
            (tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
        x = _joined(a, b, c, d)
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            ASM,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
            [low, high],
            (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
        x = tl.join(_joined(a, c, e, g), _joined(b, d, f, h))
    return x


@triton.jit
def levels(low, high, table, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Centroids of a tile of packed codes.

    Args:
        low: `[..., groups]` uint8 bytes; the two-bit plane of three-bit codes as uint16.
        high: The one-bit plane of three-bit codes, else ignored.
        table: Pointer to the centroids, float32.
        BITS: 1, 2, 3, 4 or 8.
        DTYPE: Type of the result.
        ASM: What `assembly.decoder` gave, or None for the portable form; the results are the same.

    Returns:
        `[..., groups]` with `slots(BITS)` entries in further dimensions of 2, none for 8 bits.
    """
    if ASM is not None:
        x = _levels_by_assembly(low, high, BITS, ASM)
    elif BITS == 8:
        x = _level(low, table, DTYPE)
    elif BITS == 4:
        x = tl.join(_level(low & 15, table, DTYPE), _level(low >> 4, table, DTYPE))
    elif BITS == 2:
        x = _joined(
            _level(low & 3, table, DTYPE),
            _level((low >> 2) & 3, table, DTYPE),
            _level((low >> 4) & 3, table, DTYPE),
            _level(low >> 6, table, DTYPE),
        )
    else:
        even = _joined(
            _level(_code(low, high, 0, BITS), table, DTYPE),
            _level(_code(low, high, 2, BITS), table, DTYPE),
            _level(_code(low, high, 4, BITS), table, DTYPE),
            _level(_code(low, high, 6, BITS), table, DTYPE),
        )
        odd = _joined(
            _level(_code(low, high, 1, BITS), table, DTYPE),
            _level(_code(low, high, 3, BITS), table, DTYPE),
            _level(_code(low, high, 5, BITS), table, DTYPE),
            _level(_code(low, high, 7, BITS), table, DTYPE),
        )
        x = tl.join(even, odd)
    return x
