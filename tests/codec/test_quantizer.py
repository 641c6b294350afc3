"""Distortion on random vectors, against the paper's figures and bounds; seeded, with the bound named."""

import math

import pytest
import torch

from turboquant_local.codec import MSEQuantizer, lloyd_max
from turboquant_local.errors import ConfigError

MSE = {1: 0.361, 2: 0.116, 3: 0.0339, 4: 0.0093}


def unit_vectors(count: int, head_dim: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, head_dim, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def reconstruct(quantizer: MSEQuantizer, x: torch.Tensor) -> torch.Tensor:
    return quantizer.dequantize(*quantizer.quantize(x))


@pytest.mark.parametrize("bits", MSE)
def test_least_error_is_within_one_percent_of_the_optimum(bits: int) -> None:
    x = unit_vectors(50_000, 128)
    error = (reconstruct(MSEQuantizer(128, bits, scale="least_error"), x) - x).square().sum(-1).mean().item()
    assert error <= 1.01 * MSE[bits]
    assert error <= math.sqrt(3) * math.pi / 2 * 4.0**-bits  # the paper's bound, Theorem 1


@pytest.mark.parametrize(("bits", "optimum"), [(3, 0.0334), (4, 0.0091)])
def test_least_error_at_head_size_64(bits: int, optimum: float) -> None:
    x = unit_vectors(50_000, 64)
    error = (reconstruct(MSEQuantizer(64, bits, scale="least_error"), x) - x).square().sum(-1).mean().item()
    assert error <= 1.01 * optimum


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_papers_norm_gives_the_codebooks_error(bits: int) -> None:
    x = unit_vectors(50_000, 128)
    error = (reconstruct(MSEQuantizer(128, bits, scale="norm"), x) - x).square().sum(-1).mean().item()
    assert error == pytest.approx(lloyd_max(128, bits).mse, rel=0.01)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_unbiased_scale_has_slope_one(bits: int) -> None:
    x = unit_vectors(20_000, 128)
    shown = reconstruct(MSEQuantizer(128, bits, scale="unbiased"), x)
    # Queries partly along x, as in attention: the slope of <q, x̂> over <q, x>.
    q = x + 0.5 * unit_vectors(20_000, 128, seed=1)
    truth, seen = (q * x).sum(-1).double(), (q * shown).sum(-1).double()
    assert (truth @ seen / (truth @ truth)).item() == pytest.approx(1.0, abs=0.002)
    # And the norm's slope is not, where it matters: the test can tell.
    if bits <= 2:
        paper = reconstruct(MSEQuantizer(128, bits, scale="norm"), x)
        assert (truth @ (q * paper).sum(-1).double() / (truth @ truth)).item() < 0.9


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_random_queries_see_unbiased_inner_products(bits: int) -> None:
    x, q = unit_vectors(60_000, 128), unit_vectors(60_000, 128, seed=2)
    error = ((q * reconstruct(MSEQuantizer(128, bits), x)).sum(-1) - (q * x).sum(-1)).double()
    assert abs(error.mean()) < 4 * error.std() / len(error) ** 0.5
    # Inner-product distortion times head_dim; the paper's unbiased quantizer has 1.57, 0.56, 0.18, 0.047.
    assert error.square().mean() * 128 < {1: 1.57, 2: 0.56, 3: 0.18, 4: 0.047}[bits]


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_every_head_size(head_dim: int) -> None:
    x = unit_vectors(4000, head_dim) * 7
    error = (reconstruct(MSEQuantizer(head_dim, 4), x) - x).square().sum(-1).mean() / 49
    assert error < 1.01 * lloyd_max(head_dim, 4).mse


@pytest.mark.parametrize(
    ("name", "x"),
    [("one-hot", torch.eye(128)), ("offset", torch.randn(512, 128, generator=torch.Generator().manual_seed(3)) + 3)],
)
def test_hard_inputs_cost_no_more_than_random_ones(name: str, x: torch.Tensor) -> None:
    x = x / x.norm(dim=-1, keepdim=True)
    for bits in (1, 4):
        error = (reconstruct(MSEQuantizer(128, bits, scale="norm"), x) - x).square().sum(-1).mean()
        assert error < 1.15 * MSE[bits], name


def test_zeros_stay_zero_and_large_norms_stay_finite() -> None:
    x = torch.stack([torch.zeros(64), torch.full((64,), 5000.0), torch.full((64,), 1e-6)])
    shown = reconstruct(MSEQuantizer(64, 4), x)
    assert torch.equal(shown[0], torch.zeros(64))
    assert torch.isfinite(shown).all()
    assert (shown[1] - x[1]).norm() < 0.15 * x[1].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_do_not_depend_on_batching(dtype: torch.dtype) -> None:
    quantizer = MSEQuantizer(128, 3)
    x = unit_vectors(64, 128).to(dtype)
    codes, scales = quantizer.quantize(x)
    again = [quantizer.quantize(part) for part in x.split(16)]
    assert torch.equal(codes, torch.cat([c for c, _ in again]))
    assert torch.equal(scales, torch.cat([s for _, s in again]))


@pytest.mark.parametrize(("head_dim", "bits", "name"), [(128, 0, "bits=0"), (128, 9, "bits=9"), (60, 2, "head_dim=60")])
def test_what_cannot_be_packed_is_refused_when_it_is_made(head_dim: int, bits: int, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        MSEQuantizer(head_dim, bits)


@pytest.mark.parametrize("codebook", ["grid", "lloyd_max"])
def test_constants_do_not_depend_on_who_asks_first(codebook: str) -> None:
    """In inference mode, or with another default device. No other test has this head size."""
    with torch.inference_mode(), torch.device("meta"):
        quantizer = MSEQuantizer(104, 2, codebook=codebook)
        constants = quantizer.constants(torch.device("cpu"))
    assert {x.device.type for x in constants} == {"cpu"}
    x = torch.randn(3, 104, requires_grad=True)
    quantizer.dequantize(*quantizer.quantize(x)).sum().backward()
    assert x.grad is not None
