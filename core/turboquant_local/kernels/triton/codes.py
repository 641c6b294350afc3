"""Packed codes to levels, in registers: the device functions of decode attention.

A tile of packed elements becomes a tile of levels with its `slots` (the codes that one element holds) in the last
dimensions: slot s of element g is channel `slots * g + s`. An element is 16 bits of the first plane, with 16 bits (of
three-bit codes) or 8 (of six-bit codes) of each further plane; a byte for 1 bit, and for 3 where vectors are short. The
bit order is that of `codec.packing`.

A code c of a uniform grid becomes a number by a mask alone: a float16 whose low mantissa bits are c and whose other
bits are 0 is c / 2^24, exactly, and the tensor core multiplies such numbers as any other. A code that lies p bits
higher comes out 2^p times as large; who uses it folds 2^-p into the other factor (`lowered`). The centre of the grid is
left in (`centre`) and comes off the sums.
"""

import triton
import triton.language as tl

UNIT = tl.constexpr(2.0**-24)
"""What a code of 1 at position 0 becomes."""


@triton.constexpr_function
def slots(bits: int, padded: int) -> int:
    """Codes that one element of a tile holds, for vectors padded to this size."""
    return {1: 8, 2: 8, 3: 16 if padded >= 128 else 8, 4: 4, 6: 4, 8: 2}.get(bits, 1)


@triton.constexpr_function
def _width(bits: int) -> int:
    """Bits between the positions of neighbouring codes in a byte of the first plane."""
    return {2: 2, 3: 4, 4: 4, 6: 4}.get(bits, 8)


@triton.constexpr_function
def centre(bits: int, grid: bool, exact: bool) -> float:
    """How much larger than the level, in steps, the decoded code is: nothing for the centroids of a table."""
    return (2**bits - 1) / 2 if grid and not exact else 0.0


@triton.jit
def lowered(channel, BITS: tl.constexpr):
    """2^-p of every channel, in float32, p the position of its code in the decoded tile of a grid."""
    return tl.exp2(-(channel % (8 // _width(BITS)) * _width(BITS)).to(tl.float32))


@triton.jit
def spacing(table, BITS: tl.constexpr):
    """Distance of neighbouring levels of a uniform grid."""
    return (tl.load(table + (2**BITS - 1)) - tl.load(table)) / (2**BITS - 1)


@triton.constexpr_function
def _assembly(bits: int, slots: int) -> tuple[str, str, tuple[tl.dtype, ...], int]:
    """PTX from packed elements to levels, its constraints, types of its results, and how many elements it takes.

    It is elementwise over the elements that one call takes, so any layout of the registers is right. Of 16-bit elements
    it takes two, and masks leave the same code of both, a float16 each. Of bytes it takes four, brought into the order
    0, 2, 1, 3 first, so that the low bytes of the halves are elements 0 and 1 and the high ones 2 and 3.
    """
    planes, width, per_byte = {3: 3, 6: 2}.get(bits, 1), {2: 2, 8: 8}.get(bits, 4), {2: 4, 8: 1}.get(bits, 2)
    in_bytes = bits == 3 and slots == 8
    results = 16 if bits == 3 else slots
    x, y, z = (f"${results + plane}" for plane in range(3))
    lines = [".reg .b32 x, y, z, r, t"]
    for name, operand in list(zip("xyz", (x, y, z), strict=True))[:planes]:
        lines.append(f"prmt.b32 {name}, {operand}, 0, 0x3120" if in_bytes else f"mov.b32 {name}, {operand}")

    def result(slot: int, upper: int) -> str:
        return f"${2 * slot + upper}" if in_bytes else f"${slot + upper * slots // 2}"

    if bits == 6:
        for slot, shift in enumerate(("shl.b32 t, y, 4", "shl.b32 t, y, 6", "mov.b32 t, y", "shl.b32 t, y, 2")):
            low, high = (("0x000F000F", "0x00300030"), ("0x00F000F0", "0x03000300"))[slot % 2]
            if slot == 2:
                lines.append("shr.u32 x, x, 8")
            lines += [shift, f"and.b32 t, t, {high}", f"lop3.b32 ${slot}, x, {low}, t, 0xEA"]
    else:
        words = ["x"]
        if bits == 3:
            lines += ["shr.u32 r, x, 3", "and.b32 r, r, 0x11111111"]
            lines += ["shr.u32 t, y, 2", "lop3.b32 r, t, 0x22222222, r, 0xEA"]
            lines += ["shr.u32 t, z, 1", "lop3.b32 r, t, 0x44444444, r, 0xEA"]
            words = ["x", "y", "z", "r"]
        for number, word in enumerate(words):
            for upper in (0, 1):
                if upper:
                    lines.append(f"shr.u32 {word}, {word}, 8")
                for slot in range(per_byte):
                    mask = ((2**bits - 1) << (width * slot)) * 0x10001
                    lines.append(f"and.b32 {result(number * per_byte + slot, upper)}, {word}, {mask:#x}")
    constraints = ",".join(["=&r"] * results + ["r"] * planes)
    return "{\n" + ";\n".join(lines) + ";\n}", constraints, (tl.float16,) * slots, 4 if in_bytes else 2


@triton.jit
def _code(x, y, z, SLOT: tl.constexpr, BITS: tl.constexpr):
    """The code of a slot, as an index of the codebook."""
    if BITS == 6:
        code = ((x >> (4 * SLOT)) & 15) | (((y.to(tl.uint16) >> (2 * SLOT)) & 3) << 4)
    elif BITS == 3:
        BYTE: tl.constexpr = SLOT // 8 * 8
        if SLOT % 8 < 6:
            plane = x if SLOT % 8 < 2 else (y if SLOT % 8 < 4 else z)
            code = (plane >> (BYTE + 4 * (SLOT % 2))) & 7
        else:
            BIT: tl.constexpr = BYTE + 3 + 4 * (SLOT % 2)
            code = ((x >> BIT) & 1) | (((y >> BIT) & 1) << 1) | (((z >> BIT) & 1) << 2)
    else:
        code = (x >> (BITS * SLOT)) & ((1 << BITS) - 1)
    return code.to(tl.int32)


@triton.jit
def _level(
    x, y, z, table, SLOT: tl.constexpr, BITS: tl.constexpr, GRID: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    code = _code(x, y, z, SLOT, BITS)
    if GRID:
        PER_BYTE: tl.constexpr = 8 // _width(BITS)
        level = code.to(tl.float32)
        if tl.float32 == DTYPE:
            level -= centre(BITS, True, False)
        level *= UNIT * 2.0 ** (SLOT % PER_BYTE * _width(BITS))
    else:
        level = tl.load(table + code)
    return level.to(DTYPE)


@triton.jit
def _joined(x0, x1, x2, x3):
    return tl.join(tl.join(x0, x2), tl.join(x1, x3))


@triton.jit
def joined8(x0, x1, x2, x3, x4, x5, x6, x7):
    """Eight tensors as one, by number in three further dimensions of 2."""
    return tl.join(_joined(x0, x2, x4, x6), _joined(x1, x3, x5, x7))


@triton.jit
def _levels_by_assembly(x, y, z, BITS: tl.constexpr, SLOTS: tl.constexpr):
    how: tl.constexpr = _assembly(BITS, SLOTS)
    if BITS == 3:
        r = tl.inline_asm_elementwise(how[0], how[1], [x, y, z], how[2], is_pure=True, pack=how[3])
    elif BITS == 6:
        r = tl.inline_asm_elementwise(how[0], how[1], [x, y.to(tl.uint16)], how[2], is_pure=True, pack=how[3])
    else:
        r = tl.inline_asm_elementwise(how[0], how[1], [x], how[2], is_pure=True, pack=how[3])
    if SLOTS == 2:
        out = tl.join(r[0], r[1])
    elif SLOTS == 4:
        out = _joined(r[0], r[1], r[2], r[3])
    elif SLOTS == 8:
        out = joined8(r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7])
    else:
        even = joined8(r[0], r[2], r[4], r[6], r[8], r[10], r[12], r[14])
        out = tl.join(even, joined8(r[1], r[3], r[5], r[7], r[9], r[11], r[13], r[15]))
    return out


@triton.jit
def levels(
    x, y, z, table,
    BITS: tl.constexpr, SLOTS: tl.constexpr, GRID: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Levels of a tile of packed codes.

    Args:
        x: `[..., groups]` packed elements; of three-bit codes the first plane.
        y: The second plane of three- and six-bit codes, else ignored.
        z: The third plane of three-bit codes, else ignored.
        table: Pointer to the centroids, float32; not read for a grid.
        BITS: 1, 2, 3, 4, 6 or 8.
        SLOTS: Codes an element.
        GRID: Whether the codebook is a uniform grid. Then the result is code + centre in units of `UNIT / lowered`,
            in float32 without the centre.
        DTYPE: Type of the result.
        FAST: Decode float16 by assembly; the results are the same.

    Returns:
        `[..., groups]` with `SLOTS` entries in further dimensions of 2.
    """
    if GRID and FAST and BITS > 1:
        out = _levels_by_assembly(x, y, z, BITS, SLOTS)
    elif BITS == 8:
        out = tl.join(_level(x, y, z, table, 0, BITS, GRID, DTYPE), _level(x, y, z, table, 1, BITS, GRID, DTYPE))
    elif SLOTS == 4:
        out = _four(x, y, z, table, 0, 1, BITS, GRID, DTYPE)
    elif SLOTS == 8:
        out = tl.join(_four(x, y, z, table, 0, 2, BITS, GRID, DTYPE), _four(x, y, z, table, 1, 2, BITS, GRID, DTYPE))
    else:
        even = tl.join(_four(x, y, z, table, 0, 4, BITS, GRID, DTYPE), _four(x, y, z, table, 2, 4, BITS, GRID, DTYPE))
        odd = tl.join(_four(x, y, z, table, 1, 4, BITS, GRID, DTYPE), _four(x, y, z, table, 3, 4, BITS, GRID, DTYPE))
        out = tl.join(even, odd)
    return out


@triton.jit
def _four(
    x, y, z, table, FIRST: tl.constexpr, EVERY: tl.constexpr,
    BITS: tl.constexpr, GRID: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    return _joined(
        _level(x, y, z, table, FIRST, BITS, GRID, DTYPE),
        _level(x, y, z, table, FIRST + EVERY, BITS, GRID, DTYPE),
        _level(x, y, z, table, FIRST + 2 * EVERY, BITS, GRID, DTYPE),
        _level(x, y, z, table, FIRST + 3 * EVERY, BITS, GRID, DTYPE),
    )
