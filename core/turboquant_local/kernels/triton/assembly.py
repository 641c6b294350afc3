"""PTX that decodes packed codes to float16 centroids, for `codes.levels`.

`prmt` looks four bytes up in a table of eight bytes at once: its selector is four nibbles, of which three bits count.
So codes are brought into nibbles, the low and the high bytes of the centroids are looked up and then interleaved. All
of it is elementwise over the four elements that one call takes, so any layout of the registers is right.
"""

from functools import lru_cache

import torch

from turboquant_local.codec.codebook import lloyd_max

BITS = (2, 3, 4)

_PAIR = ("0x6240", "0x7351")
"""Of looked-up nibbles 0-3: the low ones of two bytes as float16, and the high ones."""


@lru_cache(maxsize=64)
def decoder(head_dim: int, bits: int) -> str:
    """The assembly for `codes.levels`.

    Operands: two registers (four float16) a slot, then the low plane's registers, then for three bits the high
    plane's.

    Args:
        head_dim: Size of the vectors.
        bits: One of `BITS`.
    """
    lines = {2: _two, 3: _three, 4: _four}[bits](_byte_tables(head_dim, bits))
    return "{\n" + ";\n".join(lines) + ";\n}"


def _byte_tables(head_dim: int, bits: int) -> dict[str, str]:
    """Low and high bytes of the centroids, as the two words of a table; of the positive ones for four bits."""
    centroids = lloyd_max(head_dim, bits).centroids
    entries = (centroids[8:] if bits == 4 else centroids).to(torch.float16).view(torch.int16).tolist()
    entries += [0] * (8 - len(entries))
    words = {}
    for name, shift in (("l", 0), ("h", 8)):
        low, high = (sum(((x >> shift) & 255) << (8 * i) for i, x in enumerate(entries[at : at + 4])) for at in (0, 4))
        words[name] = f"{low:#x}, {high:#x}"
    return words


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
        ".reg .b32 e, o, l, h",
        "and.b32 e, $8, 0x33333333",
        "shr.u32 o, $8, 2",
        "and.b32 o, o, 0x33333333",
        *_look_up(tables, "e", 0, 2),
        *_look_up(tables, "o", 1, 3),
    ]


def _three(tables: dict[str, str]) -> list[str]:
    """The high plane's bit of a slot belongs at bit 2 of a nibble: of its byte that is bit 2 or 6."""
    lines = [
        ".reg .b32 t, u, e, o, l, h",
        "prmt.b32 t, $16, $17, 0x6420",  # slots 0-3 of the four elements
        "prmt.b32 u, $16, $17, 0x7531",  # slots 4-7
    ]
    for word, first in (("t", 0), ("u", 4)):
        lines.append(f"and.b32 e, {word}, 0x33333333")
        lines.append(f"shr.u32 o, {word}, 2")
        lines.append("and.b32 o, o, 0x33333333")
        for slot, selector, bit in ((0, "e", 2), (2, "e", 6), (1, "o", 2), (3, "o", 6)):
            by = bit - first - slot
            lines.append(f"{'shl.b32' if by > 0 else 'shr.u32'} l, $18, {abs(by)}")
            mask = "0x04040404" if bit == 2 else "0x40404040"
            lines.append(f"lop3.b32 {selector}, {selector}, l, {mask}, 0xF8")
        lines += _look_up(tables, "e", first, first + 2)
        lines += _look_up(tables, "o", first + 1, first + 3)
    return lines


def _four(tables: dict[str, str]) -> list[str]:
    """The codebook is symmetric: below 8 a code's magnitude is its bits flipped, and bit 3 is the sign."""
    lines = [
        ".reg .b32 n, m, w, l, h, s",
        "lop3.b32 n, $4, 0x88888888, 0, 0x0C",
        "shr.u32 m, n, 3",
        "sub.u32 m, n, m",
        "lop3.b32 m, $4, m, 0x77777777, 0x28",
        "shl.b32 w, $4, 4",
    ]
    for half, spread in ((0, "0x5140"), (1, "0x7362")):
        if half:
            lines.append("shr.u32 m, m, 16")
        lines += [f"prmt.b32 {name}, {words}, m" for name, words in tables.items()]
        lines.append(f"prmt.b32 s, w, $4, {spread}")
        lines.append("lop3.b32 h, h, s, 0x80808080, 0xF2")
        lines += [f"prmt.b32 ${slot * 2 + half}, l, h, {pair}" for slot, pair in enumerate(_PAIR)]
    return lines
