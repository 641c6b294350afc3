"""PTX that decodes packed codes to float16 centroids, for `codes.levels`.

`prmt` looks four bytes up in a table of eight bytes at once: its selector is four nibbles, of which three bits count.
So codes are brought into nibbles, the low and the high bytes of the centroids are looked up and then interleaved. All
of it is elementwise over the elements that one call takes, so any layout of the registers is right.
"""

from functools import lru_cache

import torch

from turboquant_local.codec.codebook import lloyd_max

BITS = (2, 3)

_PAIR = ("0x6240", "0x7351")
"""Of looked-up nibbles 0-3: the low ones of two bytes as float16, and the high ones."""


@lru_cache(maxsize=64)
def decoder(head_dim: int, bits: int) -> str:
    """The assembly for `codes.levels`.

    Operands: the registers of the slots' float16, two a slot, then the packed elements.

    Args:
        head_dim: Size of the vectors.
        bits: One of `BITS`.
    """
    tables, first = _byte_tables(head_dim, bits)
    lines = first + {2: _two, 3: _three}[bits](tables)
    return "{\n" + ";\n".join(lines) + ";\n}"


_TABLES = [
    ".reg .b32 s, t, l, h, tl, th",
    "mov.u32 tl, %lanemask_lt",
    "mov.u32 th, %lanemask_ge",
    "and.b32 tl, tl, th",
]
"""A zero that the assembler does not see through: one word of each table stays in a register of its own. Otherwise it
goes to the uniform registers, which `prmt` cannot read, and every look-up costs one move."""


def _byte_tables(head_dim: int, bits: int) -> tuple[dict[str, str], list[str]]:
    """Low and high bytes of the centroids as tables.

    Returns:
        The two words of each table as operands, and the lines that must come first.
    """
    centroids = lloyd_max(head_dim, bits).centroids
    entries = centroids.to(torch.float16).view(torch.int16).tolist()
    entries += [0] * (8 - len(entries))
    tables, lines = {}, list(_TABLES)
    for name, shift in (("h", 8), ("l", 0)):
        low, high = (sum(((x >> shift) & 255) << (8 * i) for i, x in enumerate(entries[at : at + 4])) for at in (0, 4))
        tables[name] = f"t{name}, {high:#x}"
        lines.append(f"add.u32 t{name}, tl, {low:#x}")
    return tables, lines


def _look_up(tables: dict[str, str], selector: str, even: int, odd: int) -> list[str]:
    """Centroids of the eight nibbles of a selector: the even ones to operands `even`, the odd ones to `odd`."""
    lines = []
    for half in (0, 1):
        if half:
            lines.append(f"shr.u32 {selector}, {selector}, 16")
        lines += [f"prmt.b32 {name}, {words}, {selector}" for name, words in tables.items()]
        lines += [f"prmt.b32 ${slot * 2 + half}, l, h, {pair}" for slot, pair in zip((even, odd), _PAIR, strict=True)]
    return lines


def _two(tables: dict[str, str]) -> list[str]:
    return [
        "and.b32 s, $8, 0x33333333",
        "shr.u32 t, $8, 2",
        "and.b32 t, t, 0x33333333",
        *_look_up(tables, "s", 0, 2),
        *_look_up(tables, "t", 1, 3),
    ]


def _three(tables: dict[str, str]) -> list[str]:
    """Three planes hold a code in the lowest bits of each nibble; the bits left over make up two more codes."""
    lines = []
    for plane, operand in enumerate(("$16", "$17", "$18")):
        lines.append(f"and.b32 s, {operand}, 0x77777777")
        lines += _look_up(tables, "s", 2 * plane, 2 * plane + 1)
    lines += ["shr.u32 s, $16, 3", "and.b32 s, s, 0x11111111"]
    lines += ["shr.u32 t, $17, 2", "lop3.b32 s, t, 0x22222222, s, 0xEA"]
    lines += ["shr.u32 t, $18, 1", "lop3.b32 s, t, 0x44444444, s, 0xEA"]
    return lines + _look_up(tables, "s", 6, 7)
