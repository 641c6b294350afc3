"""Codes packed into bytes, with no bit unused.

Bit order, stated once; it is chosen for kernels that take codes out of words with masks.

- 1, 2, 4 and 8 bits: a byte holds 8 / bits neighbouring codes, the first in the lowest bits.
- 3 bits: three planes of head_dim / 8 bytes. Of codes 8g to 8g + 7, byte g of plane i (0 to 2) holds number 2i at bits
  0-2, number 2i + 1 at bits 4-6, and bit i of numbers 6 and 7 at bits 3 and 7.
- 5, 6 and 7 bits: planes of 4, 2 and 1 bits, widest first and lowest bits first, each like codes of its own width with
  the first in the lowest bits.
"""

from __future__ import annotations

import torch

from turboquant_local.codec.shared import shared
from turboquant_local.errors import ConfigError


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a code, lowest bits first: 5 -> (4, 1)."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def packed_size(head_dim: int, bits: int) -> int:
    """Bytes of one packed vector.

    Raises:
        ConfigError: The head size is not a multiple of 8, or no byte holds such a code.
    """
    if not 1 <= bits <= 8:
        raise ConfigError(f"bits={bits}: codes have 1 to 8 bits")
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
    if bits == 3:
        return _pack_three(codes)
    parts, shift = [], 0
    for width in planes(bits):
        parts.append(_pack_plane((codes >> shift) & ((1 << width) - 1), width))
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
    if bits == 3:
        return _unpack_three(packed)
    if len(planes(bits)) == 1:
        return _look_up(packed, byte_codes(bits, packed.device))
    head_dim = packed.shape[-1] * 8 // bits
    codes, start, shift = torch.zeros(*packed.shape[:-1], head_dim, dtype=torch.uint8, device=packed.device), 0, 0
    for width in planes(bits):
        size = head_dim * width // 8
        codes |= _look_up(packed[..., start : start + size], byte_codes(width, packed.device)) << shift
        start, shift = start + size, shift + width
    return codes


def _pack_plane(part: torch.Tensor, width: int) -> torch.Tensor:
    slots = part.unflatten(-1, (-1, 8 // width))
    byte: torch.Tensor = slots[..., 0].clone()
    for slot in range(1, 8 // width):
        byte |= slots[..., slot] << (slot * width)
    return byte


def _pack_three(codes: torch.Tensor) -> torch.Tensor:
    slots = codes.unflatten(-1, (-1, 8)).unbind(-1)
    parts: list[torch.Tensor] = [
        slots[2 * i] | (slots[2 * i + 1] << 4) | (((slots[6] >> i) & 1) << 3) | (((slots[7] >> i) & 1) << 7)
        for i in range(3)
    ]
    return torch.cat(parts, -1)


def _unpack_three(packed: torch.Tensor) -> torch.Tensor:
    parts = packed.chunk(3, dim=-1)
    codes = [(part >> shift) & 7 for part in parts for shift in (0, 4)]
    for bit in (3, 7):
        low, middle, high = ((part >> bit) & 1 for part in parts)
        codes.append(low | (middle << 1) | (high << 2))
    return torch.stack(codes, -1).flatten(-2)


def _look_up(packed: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding(packed.int(), table).flatten(-2)


@shared
def byte_codes(width: int, device: torch.device) -> torch.Tensor:
    """The codes in every byte of a plane: `[256, 8 / width]` uint8."""
    byte = torch.arange(256, dtype=torch.int32)[:, None]
    shifts = torch.arange(0, 8, width, dtype=torch.int32)
    return ((byte >> shifts) & ((1 << width) - 1)).to(torch.uint8).to(device)
