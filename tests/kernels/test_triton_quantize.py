"""Packing and unpacking in Triton against the reference, in the interpreter where there is no GPU."""

import importlib.util
from dataclasses import dataclass

import pytest
import torch

from turboquant_local.codec import IdentityQuantizer, MSEQuantizer, unpack_codes
from turboquant_local.codec.statistics import HeadStatistics, head_statistics, typical_norm
from turboquant_local.errors import BackendError
from turboquant_local.kernels import api
from turboquant_local.kernels.layout import PackedKV

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("_poisoned")


def grid(head_dim: int, bits: int, scale: str = "unbiased", scale_bits: int = 16) -> MSEQuantizer:
    return MSEQuantizer(head_dim, bits, scale=scale, scale_bits=scale_bits, codebook="grid")  # type: ignore[arg-type]


def vectors(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of any norm, the first 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.rand(shape[:-1], generator=generator).mul(20).exp()[..., None]
    x[0, 0, 0] = 0
    return x.to(DEVICE, dtype)


def keys(batch: int, tokens: int, head_dim: int) -> torch.Tensor:
    """With a bias, channels of unequal spread, and a first one equal to the mean that is taken off."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, tokens, head_dim, generator=generator) * torch.logspace(-0.5, 0.5, head_dim)
    return (x + 2 * torch.randn(head_dim, generator=generator)).to(DEVICE)


def assert_same(packed: PackedKV, expected: PackedKV, vectors_differ: float = 0.01) -> None:
    """Equal but for ties: of a coordinate between two codes, or of a vector between two steps."""
    a, b = (unpack_codes(part.codes, part.quantizer.bits).int() for part in (packed, expected))
    assert a.shape == b.shape
    same = (a == b).all(-1)
    assert (~same).sum() <= max(1, vectors_differ * same.numel())
    assert packed.scales is not None
    assert expected.scales is not None
    assert packed.scales.dtype == expected.scales.dtype
    if packed.scales.dtype == torch.uint8:
        steps = (packed.scales.int() - expected.scales.int())[same].abs()
        assert steps.max() <= 1
        assert (steps > 0).sum() <= max(1, 0.01 * same.numel())
    else:
        torch.testing.assert_close(packed.scales[same], expected.scales[same], rtol=1e-3, atol=0)


def assert_quantized_alike(
    x: torch.Tensor, quantizer: MSEQuantizer, mean: torch.Tensor | None, vectors_differ: float = 0.01
) -> None:
    unit = typical_norm(x if mean is None else x.float() - mean.float()) if quantizer.scale_bits == 8 else None
    statistics = HeadStatistics(mean=mean, scale_unit=unit)
    packed, expected = (api.quantize_kv(x, quantizer, statistics, impl=impl) for impl in ("triton", "reference"))
    assert_same(packed, expected, vectors_differ)


@pytest.mark.parametrize(
    ("head_dim", "bits", "scale", "dtype"),
    [
        pytest.param(128, 4, "unbiased", torch.bfloat16, id="d128-4-bit"),
        pytest.param(64, 1, "norm", torch.float16, id="d64-1-bit-norm"),
        pytest.param(80, 3, "least_error", torch.float32, id="d80-3-bit-least-error"),
        pytest.param(96, 2, "unbiased", torch.bfloat16, id="d96-2-bit"),
        pytest.param(40, 5, "unbiased", torch.float32, id="d40-5-bit"),
        pytest.param(128, 6, "unbiased", torch.bfloat16, id="d128-6-bit"),
        pytest.param(64, 7, "unbiased", torch.float16, id="d64-7-bit"),
        pytest.param(192, 4, "unbiased", torch.float16, id="d192-4-bit"),
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
    assert_quantized_alike(x, grid(head_dim, bits, scale, scale_bits), mean)


def test_strided_and_short_inputs() -> None:
    whole = vectors(1, 130, 2, 64).transpose(1, 2)
    quantizer = grid(64, 4)
    for x in (whole, whole[:, 1:, 5:6], whole[:, :, :0], whole.transpose(2, 3).contiguous().transpose(2, 3)):
        if x.shape[2]:
            assert_quantized_alike(x, quantizer, None)
        else:
            assert api.quantize_kv(x, quantizer, impl="triton").codes.shape == (1, 2, 0, 32)


def test_a_bias_far_above_the_spread_costs_no_precision() -> None:
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    mean = torch.zeros(1, 1, 1, 64, device=DEVICE).index_fill(3, torch.tensor([3], device=DEVICE), 1000.0)
    assert_quantized_alike(x + mean, grid(64, 4), mean, vectors_differ=0.1)


@pytest.mark.parametrize(
    ("head_dim", "near_bits", "bits", "scale", "weigh"),
    [
        pytest.param(128, 6, 4, "unbiased", False, id="d128-6-to-4"),
        pytest.param(80, 6, 3, "least_error", False, id="d80-6-to-3-least-error"),
        pytest.param(64, 8, 6, "unbiased", False, id="d64-8-to-6"),
        pytest.param(64, 3, 1, "norm", False, id="d64-3-to-1-norm"),
        pytest.param(128, 6, 4, "unbiased", True, id="d128-6-to-4-weighted"),
        pytest.param(80, 6, 3, "unbiased", True, id="d80-6-to-3-weighted"),
        pytest.param(40, 8, 1, "norm", True, id="d40-8-to-1-weighted-norm"),
    ],
)
def test_packed_tokens_are_packed_again_as_by_the_reference(
    head_dim: int, near_bits: int, bits: int, scale: str, weigh: bool
) -> None:
    x = keys(1 if weigh else 2, 70, head_dim)
    statistics = head_statistics(x, center=True, weigh=weigh, unit=True)
    unweighted = HeadStatistics(statistics.mean, None, statistics.scale_unit)
    near = api.quantize_kv(x, grid(head_dim, near_bits, scale), unweighted, impl="reference")
    for part in (near, near.tokens(3, 20)):
        packed, expected = (
            api.requantize_kv(part, grid(head_dim, bits, scale, 8), statistics, impl=impl)
            for impl in ("triton", "reference")
        )
        assert_same(packed, expected)


@pytest.mark.parametrize("weigh", [False, True])
def test_two_bits_lose_no_more_than_by_the_reference(weigh: bool) -> None:
    """Six-bit levels often lie half-way between two-bit ones, where rounding decides."""
    x = keys(1, 100, 64)
    statistics = head_statistics(x, center=True, weigh=weigh, unit=True)
    near = api.quantize_kv(x, grid(64, 6), HeadStatistics(statistics.mean), impl="reference")
    errors = []
    for impl in ("triton", "reference"):
        packed = api.requantize_kv(near, grid(64, 2, scale_bits=8), statistics, impl=impl)
        error = api.dequantize_kv(packed, torch.float32, impl="reference") - x
        errors.append((error.square() * (1 if statistics.weights is None else statistics.weights)).mean().item())
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize(("head_dim", "dtype"), [(128, torch.float32), (80, torch.float32), (192, torch.bfloat16)])
def test_unpacked_tokens_are_those_of_float64(bits: int, head_dim: int, dtype: torch.dtype) -> None:
    x = keys(2, 70, head_dim)
    statistics = head_statistics(x, center=bits != 4, weigh=False, unit=True)
    quantizer = grid(head_dim, bits, scale_bits=8 if bits < 4 else 16)
    packed = api.quantize_kv(x, quantizer, statistics, impl="reference").tokens(1, 69)
    out = api.dequantize_kv(packed, dtype, impl="triton")
    scales = packed.scale_values()
    assert scales is not None
    rotated = quantizer.levels(packed.codes).double() * scales.double().unsqueeze(-1)
    truth = rotated @ quantizer.constants(x.device)[0].double()
    if packed.mean is not None:
        truth = truth + packed.mean.double()
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), truth, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_refusals() -> None:
    @dataclass(frozen=True)
    class Other(MSEQuantizer):
        feedback: bool = True

    x = vectors(1, 1, 3, 64)
    with pytest.raises(BackendError, match="feedback: it does not know this option"):
        api.quantize_kv(x, Other(64, 4, codebook="grid"), impl="triton")
    weighted = HeadStatistics(weights=torch.ones(1, 1, 1, 64))
    with pytest.raises(BackendError, match="weights of channels are given"):
        api.quantize_kv(x, grid(64, 4), weighted, impl="triton")
    with pytest.raises(BackendError, match="codebook=lloyd_max: it serves grid"):
        api.quantize_kv(x, MSEQuantizer(64, 4, codebook="lloyd_max"), impl="triton")
    with pytest.raises(BackendError, match="IdentityQuantizer: it serves the MSE quantizer"):
        api.quantize_kv(x, IdentityQuantizer(64), impl="triton")
    with pytest.raises(BackendError, match="head_dim=16: it serves 32 to 256"):
        api.quantize_kv(x[..., :16], grid(16, 4), impl="triton")
    with pytest.raises(BackendError, match="this installation has reference"):
        api.quantize_kv(x, grid(64, 4), impl="cuda")
    five = api.quantize_kv(x, grid(64, 5))
    with pytest.raises(BackendError, match="bits=5: it reads 1, 2, 3, 4, 6, 8"):
        api.dequantize_kv(five, torch.float32, impl="triton")
    with pytest.raises(BackendError, match="bits=5: it reads"):
        api.requantize_kv(five, grid(64, 3), weighted, impl="triton")
    large = api.quantize_kv(torch.ones(1, 1, 3, 192, device=DEVICE), grid(192, 6))
    weighted = HeadStatistics(weights=torch.ones(1, 1, 1, 192))
    with pytest.raises(BackendError, match="head_dim=192 with weights of channels: it serves up to 128"):
        api.requantize_kv(large, grid(192, 4), weighted, impl="triton")
    assert api.quantize_kv(x, Other(64, 4)).codes.shape == (1, 1, 3, 32)
