import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboquant_local.codec import pack_codes, unpack_codes
from turboquant_local.errors import ConfigError


@given(bits=st.integers(1, 8), eighths=st.integers(1, 32), rows=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_unpack_is_the_inverse_and_no_bit_is_wasted(bits: int, eighths: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, 8 * eighths), generator=generator).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.nbytes * 8 == codes.numel() * bits
    assert torch.equal(unpack_codes(packed, bits), codes)


def test_bit_order() -> None:
    codes = torch.tensor([1, 2, 3, 0, 1, 2, 3, 0], dtype=torch.uint8)
    assert pack_codes(codes, 2).tolist() == [0b00_11_10_01] * 2
    codes = torch.tensor([8, 1, 10, 11, 4, 13, 6, 15], dtype=torch.uint8)
    assert pack_codes(codes, 4).tolist() == [0x18, 0xBA, 0xD4, 0xF6]
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 0b001, 0b110], dtype=torch.uint8)
    assert pack_codes(codes, 3).tolist() == [0x21 | 0x08, 0x43 | 0x80, 0x65 | 0x80]
    codes = torch.tensor([1, 2, 3, 4, 17, 18, 19, 20], dtype=torch.uint8)
    assert pack_codes(codes, 5).tolist() == [0x21, 0x43, 0x21, 0x43, 0b1111_0000]


def test_refuses_head_sizes_that_leave_bits_unused() -> None:
    with pytest.raises(ConfigError, match=r"head_dim=36.*multiples of 8"):
        pack_codes(torch.zeros(36, dtype=torch.uint8), 4)
