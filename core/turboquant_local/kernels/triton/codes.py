"""Packed codes to centroids, in registers: the device functions that all operations share.

A tile of packed elements becomes a tile of centroids with its `slots` (the codes that one element holds) in the last
dimensions: slot s of element g is channel `slots * g + s`. An element is a byte; for four bits 16 bits; for three bits
one byte of each of three planes; for six bits 16 bits of the first plane and a byte of the second. The bit order is
that of `codec.packing`.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def slots(bits: int) -> int:
    """Codes that one element of a tile holds."""
    return {1: 8, 2: 4, 3: 8, 4: 4, 6: 4}.get(bits, 1)


@triton.jit
def _code(x, y, z, SLOT: tl.constexpr, BITS: tl.constexpr):
    """The code of a slot, as an index of the codebook."""
    if BITS == 8:
        code = x
    elif BITS == 4:
        code = (x >> (4 * SLOT)) & 15
    elif BITS == 6:
        code = ((x >> (4 * SLOT)) & 15) | (((y.to(tl.uint16) >> (2 * SLOT)) & 3) << 4)
    elif BITS == 3:
        if SLOT < 6:
            plane = x if SLOT < 2 else (y if SLOT < 4 else z)
            code = (plane >> (4 * (SLOT % 2))) & 7
        else:
            BIT: tl.constexpr = 3 + 4 * (SLOT % 2)
            code = ((x >> BIT) & 1) | (((y >> BIT) & 1) << 1) | (((z >> BIT) & 1) << 2)
    else:
        code = (x >> (BITS * SLOT)) & ((1 << BITS) - 1)
    return code


@triton.jit
def _level(x, y, z, table, SLOT: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(table + _code(x, y, z, SLOT, BITS).to(tl.int32)).to(DTYPE)


@triton.jit
def _joined(x0, x1, x2, x3):
    return tl.join(tl.join(x0, x2), tl.join(x1, x3))


@triton.jit
def _levels_by_assembly(x, y, z, BITS: tl.constexpr, ASM: tl.constexpr):
    if BITS == 2:
        a, b, c, d = tl.inline_asm_elementwise(
            ASM,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [x],
            (tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
        out = _joined(a, b, c, d)
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            ASM,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
            [x, y, z],
            (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
        out = tl.join(_joined(a, c, e, g), _joined(b, d, f, h))
    return out


@triton.jit
def levels(x, y, z, table, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Centroids of a tile of packed codes.

    Args:
        x: `[..., groups]` packed elements; of three-bit codes the first plane.
        y: The second plane of three- and six-bit codes, else ignored.
        z: The third plane of three-bit codes, else ignored.
        table: Pointer to the centroids, float32.
        BITS: 1, 2, 3, 4, 6 or 8.
        DTYPE: Type of the result.
        ASM: What `assembly.decoder` gave, or None for the portable form; the results are the same.

    Returns:
        `[..., groups]` with `slots(BITS)` entries in further dimensions of 2, none for 8 bits.
    """
    if ASM is not None:
        out = _levels_by_assembly(x, y, z, BITS, ASM)
    elif BITS == 8:
        out = _level(x, y, z, table, 0, BITS, DTYPE)
    else:
        even = _level(x, y, z, table, 0, BITS, DTYPE), _level(x, y, z, table, 2, BITS, DTYPE)
        odd = _level(x, y, z, table, 1, BITS, DTYPE), _level(x, y, z, table, 3, BITS, DTYPE)
        if BITS == 2 or BITS == 4 or BITS == 6:
            out = _joined(even[0], odd[0], even[1], odd[1])
        else:
            more_even = _level(x, y, z, table, 4, BITS, DTYPE), _level(x, y, z, table, 6, BITS, DTYPE)
            more_odd = _level(x, y, z, table, 5, BITS, DTYPE), _level(x, y, z, table, 7, BITS, DTYPE)
            out = tl.join(
                _joined(even[0], even[1], more_even[0], more_even[1]),
                _joined(odd[0], odd[1], more_odd[0], more_odd[1]),
            )
    return out
