"""How scales are stored."""

import torch

from turboquant_local.codec import IdentityQuantizer, MSEQuantizer
from turboquant_local.kernels.layout import PackedKV, store_scales, vector_bytes


def shown(scales: torch.Tensor, unit: torch.Tensor | None) -> torch.Tensor:
    stored = store_scales(scales, unit)
    assert stored.dtype == (torch.float16 if unit is None else torch.uint8)
    values = PackedKV(MSEQuantizer(64, 4), torch.empty(0), stored, unit, None).scale_values()
    assert values is not None
    return values


def test_eight_bits_hold_a_scale_to_1_1_percent_within_their_reach() -> None:
    unit = torch.tensor([0.02, 3.0, 5000.0]).view(1, 3, 1)
    scales = unit * torch.logspace(-0.89, 1.49, 500)  # from 1/8 of the unit to 31 times
    assert ((shown(scales, unit) / scales - 1).abs() < 0.011).all()


def test_beyond_the_reach_a_scale_is_held_or_becomes_zero() -> None:
    unit = torch.full((1, 1, 1), 2.0)
    values = shown(torch.tensor([[[0.0, 1e-6, 0.1, 0.2, 1e4]]]), unit)[0, 0].tolist()
    smallest, largest = 2 * 2 ** (-95 / 32), 2 * 2 ** (159 / 32)
    assert values[:2] == [0.0, 0.0]  # nearer to 0
    assert values[2:4] == [0.0, torch.tensor(smallest).item()]
    assert abs(values[4] - largest) < 1e-4


def test_sixteen_bits_hold_what_float16_holds() -> None:
    assert shown(torch.tensor([[[0.5, 1e6]]]), None)[0, 0].tolist() == [0.5, 65504.0]


def test_bytes_of_a_vector() -> None:
    assert vector_bytes(MSEQuantizer(128, 3, scale_bits=8), torch.bfloat16) == 49
    assert vector_bytes(MSEQuantizer(128, 6), torch.bfloat16) == 98
    assert vector_bytes(IdentityQuantizer(80), torch.float32) == 320
