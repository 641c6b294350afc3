"""The uniform grid against the paper's levels, and what is mended after rounding."""

import pytest
import torch

from turboquant_local.codec import MSEQuantizer, lloyd_max
from turboquant_local.codec.grid import grid_centroids, nearest_level, vector_steps
from turboquant_local.codec.refine import refine_levels
from turboquant_local.codec.scales import STEPS_PER_OCTAVE, rounded_scales, scale_codes, scales_of


def vectors(tokens: int = 4000, head_dim: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, head_dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "more"), [(1, 1.01), (2, 1.02), (3, 1.06), (4, 1.09), (6, 1.1), (8, 1.06)])
def test_a_step_for_every_vector_makes_up_for_equal_distances(bits: int, more: float) -> None:
    x = vectors()
    quantizer = MSEQuantizer(128, bits, scale="least_error", codebook="grid")
    error = (quantizer.dequantize(*quantizer.quantize(x)) - x).square().sum() / x.square().sum()
    assert lloyd_max(128, bits).mse * 0.9 < error < lloyd_max(128, bits).mse * more


def test_levels_are_what_masks_give() -> None:
    for bits in (2, 3, 4, 6, 8):
        distances = grid_centroids(128, bits).diff()
        torch.testing.assert_close(distances, distances[:1].expand_as(distances))
        codes, level = nearest_level(torch.tensor([-1e9, -0.2, 0.2, 1e9]), bits)
        assert codes.tolist() == [0, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1]
        torch.testing.assert_close(level, codes - (2**bits - 1) / 2)


def test_no_vector_steps_past_its_largest_coordinate() -> None:
    x = vectors(200) * torch.tensor([1e-6, 1.0, 1e6, 0.0]).repeat(50)[:, None]
    steps = vector_steps(x, 4)
    assert (steps > 0).all()
    assert (steps[3::4] < 1e-30).all()
    assert (steps <= x.abs().amax(-1, keepdim=True) / 7.5 + 1e-30).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_refining_lessens_the_error_and_nearly_ends_the_stretch(weighted: bool) -> None:
    y, bits = torch.nn.functional.normalize(vectors(), dim=-1), 3
    weights = torch.linspace(0.3, 1.7, 128) if weighted else torch.ones(128)
    gram = torch.diag(weights)
    step = vector_steps(y, bits)
    level = nearest_level(y / step, bits)[1]
    unbiased = (y * weights * y).sum(-1, keepdim=True) / (y * weights * level).sum(-1, keepdim=True)
    step = rounded_scales(unbiased)

    def measured(level: torch.Tensor) -> tuple[float, float]:
        error = step * level - y
        stretch = (error * weights * y).sum(-1) / (y * weights * y).sum(-1)
        return (error.square() * weights).sum(-1).mean().item(), stretch.square().mean().sqrt().item()

    refined = refine_levels(y, y @ gram, level, step, bits, gram if weighted else None)
    assert refined.abs().max() == 3.5
    assert ((refined - level).abs().sum(-1) <= 2).all()
    (before, stretch_before), (after, stretch_after) = measured(level), measured(refined)
    assert after < before * 1.01
    assert stretch_after < stretch_before / 2


def test_refining_goes_down_the_same_way_with_moments_of_one() -> None:
    y, bits = torch.nn.functional.normalize(vectors(300), dim=-1), 4
    step = rounded_scales(vector_steps(y, bits))
    level = nearest_level(y / step, bits)[1]
    plain, general = (refine_levels(y, y, level, step, bits, gram) for gram in (None, torch.eye(128)))
    assert (plain == general).all(-1).float().mean() > 0.99


def test_scales_lie_on_one_grid_whatever_the_unit() -> None:
    scales = rounded_scales(torch.rand(1000, generator=torch.Generator().manual_seed(1)) * 5 + 0.5)
    for unit in rounded_scales(torch.tensor([0.7, 1.0, 2.9])):
        torch.testing.assert_close(scales_of(scale_codes(scales, unit), unit), scales, rtol=1e-5, atol=0)
    ratio = (rounded_scales(scales * 1.013) / scales).log2() * STEPS_PER_OCTAVE
    assert set(ratio.round().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("weights", [None, torch.linspace(0.2, 3.0, 128).view(1, 1, 128)])
def test_inner_products_keep_slope_one_with_scales_in_a_byte(weights: torch.Tensor | None) -> None:
    x = vectors(20_000).unsqueeze(0)
    quantizer = MSEQuantizer(128, 4, scale_bits=8, codebook="grid")
    shown = quantizer.dequantize(*quantizer.quantize(x, weights))
    measure = torch.ones(128) if weights is None else weights
    slope = (shown * measure * x).sum(-1) / (x * measure * x).sum(-1)
    assert slope.mean().item() == pytest.approx(1.0, abs=1e-3)
    assert slope.std().item() < 0.003  # rounding the scale alone spreads it by 0.006
