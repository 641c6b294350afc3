"""Quantisation in Triton against the reference, in the interpreter where there is no GPU."""

import importlib.util
from dataclasses import dataclass

import pytest
import torch

from turboquant_local.codec import IdentityQuantizer, MSEQuantizer, lloyd_max, unpack_codes
from turboquant_local.codec.statistics import HeadStatistics, typical_norm
from turboquant_local.errors import BackendError
from turboquant_local.kernels import api

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("_poisoned")


def vectors(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.rand(shape[:-1], generator=generator).mul(20).exp()[..., None]
    x[0, 0, 0] = 0
    return x.to(DEVICE, dtype)


def assert_same(x: torch.Tensor, quantizer: MSEQuantizer, mean: torch.Tensor | None) -> None:
    """Equal codes but for coordinates within rounding of a boundary, and equal scales where the codes are."""
    unit = typical_norm(x if mean is None else x.float() - mean.float()) if quantizer.scale_bits == 8 else None
    statistics = HeadStatistics(mean=mean, scale_unit=unit)
    expected = api.quantize_kv(x, quantizer, statistics, impl="reference")
    packed = api.quantize_kv(x, quantizer, statistics, impl="triton")
    assert packed.codes.shape == expected.codes.shape
    a, b = (unpack_codes(part.codes, quantizer.bits).int() for part in (packed, expected))
    assert (a - b).abs().max() <= 1
    differ = a != b
    assert differ.float().mean() < 1e-3
    y = quantizer.rotate(x.float() if mean is None else x.float() - mean.float())
    y = y / y.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    boundaries = lloyd_max(quantizer.head_dim, quantizer.bits).boundaries.float().to(x.device)
    assert torch.allclose(y[differ], boundaries[torch.minimum(a, b)[differ].long()], atol=1e-6, rtol=0)
    assert packed.scales.dtype == expected.scales.dtype
    same = ~differ.any(-1)
    for within, tolerance in ((torch.ones_like(same), 2e-3), (same, 1e-3)):
        if quantizer.scale_bits == 8:  # a step, where a scale lies between two codes
            steps = (packed.scales.int() - expected.scales.int())[within].abs()
            assert steps.max() <= 1
            assert steps.float().mean() < 10 * tolerance
        else:
            torch.testing.assert_close(packed.scales[within], expected.scales[within], rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    ("head_dim", "bits", "scale", "dtype"),
    [
        pytest.param(128, 4, "unbiased", torch.bfloat16, id="d128-4-bit"),
        pytest.param(64, 1, "norm", torch.float16, id="d64-1-bit-norm"),
        pytest.param(80, 3, "least_error", torch.float32, id="d80-3-bit-least-error"),
        pytest.param(96, 2, "unbiased", torch.bfloat16, id="d96-2-bit"),
        pytest.param(40, 5, "unbiased", torch.float32, id="d40-5-bit"),
        pytest.param(64, 6, "unbiased", torch.bfloat16, id="d64-6-bit"),
        pytest.param(64, 7, "unbiased", torch.float16, id="d64-7-bit"),
        pytest.param(192, 4, "unbiased", torch.bfloat16, id="d192-4-bit"),
        pytest.param(256, 8, "least_error", torch.float32, id="d256-8-bit"),
    ],
)
@pytest.mark.parametrize("center", [False, True])
def test_codes_and_scales_are_the_references(
    head_dim: int, bits: int, scale: str, dtype: torch.dtype, center: bool
) -> None:
    x = vectors(2, 3, 70, head_dim)
    x = (x / 2**17).to(dtype) if dtype == torch.float16 else x.to(dtype)
    mean = x[:, :, :9].float().mean(2, keepdim=True).to(dtype) if center else None
    scale_bits = 8 if dtype == torch.bfloat16 and bits <= 4 else 16
    assert_same(x, MSEQuantizer(head_dim, bits, scale=scale, scale_bits=scale_bits), mean)  # type: ignore[arg-type]


def test_strided_and_short_inputs() -> None:
    whole = vectors(1, 130, 2, 64).transpose(1, 2)
    quantizer = MSEQuantizer(64, 4)
    for x in (whole, whole[:, 1:, 5:6], whole[:, :, :0], whole.transpose(2, 3).contiguous().transpose(2, 3)):
        if x.shape[2]:
            assert_same(x, quantizer, None)
        else:
            assert api.quantize_kv(x, quantizer, impl="triton").codes.shape == (1, 2, 0, 32)


def test_large_biases_cost_no_precision() -> None:
    x = vectors(1, 1, 64, 64).clamp(-4, 4)
    mean = torch.zeros(1, 1, 1, 64, device=DEVICE).index_fill(3, torch.tensor([3], device=DEVICE), 1000.0)
    assert_same(x + mean, MSEQuantizer(64, 4), mean)


def test_refusals() -> None:
    @dataclass(frozen=True)
    class Other(MSEQuantizer):
        feedback: bool = True

    x = vectors(1, 1, 3, 64)
    with pytest.raises(BackendError, match="feedback: it does not know this option"):
        api.quantize_kv(x, Other(64, 4), impl="triton")
    weighted = HeadStatistics(weights=torch.ones(1, 1, 1, 64))
    with pytest.raises(BackendError, match="weights of channels are given"):
        api.quantize_kv(x, MSEQuantizer(64, 4), weighted, impl="triton")
    with pytest.raises(BackendError, match="IdentityQuantizer: it serves the MSE quantizer"):
        api.quantize_kv(x, IdentityQuantizer(64), impl="triton")
    with pytest.raises(BackendError, match="head_dim=16: it serves 32 to 256"):
        api.quantize_kv(x[..., :16], MSEQuantizer(16, 4), impl="triton")
    with pytest.raises(BackendError, match="this installation has reference"):
        api.quantize_kv(x, MSEQuantizer(64, 4), impl="cuda")
    assert api.quantize_kv(x, Other(64, 4)).codes.shape == (1, 1, 3, 32)
