"""Codes packed into bytes, with no bit unused.

Bit order, stated once. A width of 1, 2, 4 or 8 bits is one plane; other widths are several, widest first and
lowest bits first: 3 bits = a plane of 2 (bits 0-1 of every code), then a plane of 1 (bit 2). In a plane of p bits
a byte holds 8 / p neighbouring codes, the first in the lowest bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from turboquant_local.errors import ConfigError


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a code, lowest bits first: 3 -> (2, 1)."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def packed_size(head_dim: int, bits: int) -> int:
    """Bytes of one packed vector.

    Raises:
        ConfigError: The head size is not a multiple of 8.
    """
    if head_dim % 8:
        raise ConfigError(
            f"head_dim={head_dim}: codes pack into whole bytes only for multiples of 8; skip these layers"
        )
    return head_dim * bits // 8


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: `[..., head_dim]` uint8, each below 2**bits.
        bits: 1 to 8.

    Returns:
        `[..., head_dim * bits / 8]` uint8.
    """
    packed_size(codes.shape[-1], bits)
    parts, shift = [], 0
    for width in planes(bits):
        part = (codes >> shift) & ((1 << width) - 1)
        slots = part.unflatten(-1, (-1, 8 // width))
        byte = slots[..., 0].clone()
        for slot in range(1, 8 // width):
            byte |= slots[..., slot] << (slot * width)
        parts.append(byte)
        shift += width
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_codes`.

    Args:
        packed: `[..., head_dim * bits / 8]` uint8.
        bits: 1 to 8.

    Returns:
        `[..., head_dim]` uint8.
    """
    head_dim = packed.shape[-1] * 8 // bits
    codes, start, shift = None, 0, 0
    for width in planes(bits):
        size = head_dim * width // 8
        table = byte_codes(width, packed.device)
        part = torch.nn.functional.embedding(packed[..., start : start + size].int(), table).flatten(-2) << shift
        codes = part if codes is None else codes | part
        start, shift = start + size, shift + width
    assert codes is not None
    return codes


@lru_cache(maxsize=32)
def byte_codes(width: int, device: torch.device) -> torch.Tensor:
    """The codes in every byte of a plane: `[256, 8 / width]` uint8."""
    byte = torch.arange(256, dtype=torch.int32)[:, None]
    shifts = torch.arange(0, 8, width, dtype=torch.int32)
    return ((byte >> shifts) & ((1 << width) - 1)).to(torch.uint8).to(device)
