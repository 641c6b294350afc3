"""Products with one token against float64."""

import importlib.util

import pytest
import torch
from torch.nn.functional import gelu, linear, silu

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from turboquant_local.kernels.triton import products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2}  # Triton's interpreter cuts bfloat16 off
pytestmark = pytest.mark.usefixtures("_poisoned")


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))
    return (values / shape[-1] ** 0.5).to(DEVICE, dtype)


def assert_near(out: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype
    assert out.shape == truth.shape
    assert (out.double() - truth).norm() <= TOLERANCE[dtype] * truth.norm()  # NaN fails


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [64, 100, 1030, 8200])  # a part of a tile, one and more, each way of cutting
@pytest.mark.parametrize("outputs", [(33,), (8, 3), (32, 7, 10)], ids=str)
def test_projections(outputs: tuple[int, ...], size: int, dtype: torch.dtype) -> None:
    x = noise(1, 1, size, dtype=dtype) * size**0.5
    weights = [noise(n, size, dtype=dtype) for n in outputs]
    for biases in ([None] * len(outputs), [noise(n, dtype=dtype) for n in outputs]):
        out = products.linear(x, weights, biases)
        assert len(out) == len(outputs)
        for one, weight, bias in zip(out, weights, biases, strict=True):
            assert_near(one, linear(x.double(), weight.double(), None if bias is None else bias.double()), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_residual_is_added(dtype: torch.dtype) -> None:
    x, weight, residual = noise(1, 1, 100, dtype=dtype), noise(13, 100, dtype=dtype), noise(1, 1, 13, dtype=dtype)
    (out,) = products.linear(x, [weight], [None], residual)
    assert_near(out, linear(x.double(), weight.double()) + residual.double(), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("size", "width"), [(64, 33), (2060, 7), (8200, 2)])
@pytest.mark.parametrize("activation", products.ACTIVATIONS)
def test_gated(activation: str, size: int, width: int, dtype: torch.dtype) -> None:
    x = noise(1, 1, size, dtype=dtype) * size**0.5
    gate, up = (noise(width, size, dtype=dtype, seed=seed) * 3 for seed in (0, 1))
    act = silu if activation == "silu" else lambda value: gelu(value, approximate="tanh")
    truth = act(linear(x.double(), gate.double())) * linear(x.double(), up.double())
    assert_near(products.gated(x, gate, up, activation), truth, dtype)
