"""The kernels of a decode step round as transformers' own operations do."""

import importlib.util

import pytest
import torch
from transformers.models.llama import modeling_llama

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from turboquant_local.kernels.triton import step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
pytestmark = pytest.mark.usefixtures("_poisoned")


def noise(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def rounds_to_nearest(dtype: torch.dtype) -> bool:
    """Triton's interpreter cuts bfloat16 off."""
    return DEVICE == "cuda" or dtype != torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 4096), (1, 1, 5, 80), (3, 2050)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = modeling_llama.LlamaRMSNorm(shape[-1], eps=1e-5).to(DEVICE, dtype)
    norm.weight.data = noise(shape[-1], dtype=dtype)
    x = noise(*shape, dtype=dtype) * 3
    expected, out = norm(x), step.rms_norm(x, norm.weight, 1e-5)
    if rounds_to_nearest(dtype):  # the mean of squares is summed in another order: a value may be rounded otherwise
        assert (out != expected).float().mean() < (0.5 if dtype == torch.float32 else 0.01)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 80, 128])
def test_rotation(size: int, dtype: torch.dtype) -> None:
    q, k = (noise(1, 1, heads * size, dtype=dtype).view(1, 1, heads, size).transpose(1, 2) for heads in (6, 2))
    cos, sin = noise(1, 1, size, dtype=dtype), noise(1, 1, size + 1, dtype=dtype)[..., 1:].contiguous()
    expected = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    for out, truth in zip(step.rotary(q, k, cos, sin), expected, strict=True):
        assert out.shape == truth.shape
        tolerance = 0.04 if not rounds_to_nearest(dtype) else 1e-6 if dtype == torch.float32 else 0
        torch.testing.assert_close(out, truth, rtol=tolerance, atol=tolerance)


def test_what_is_refused() -> None:
    assert step.refusal(noise(2, dtype=torch.float64)) == (
        "dtype torch.float64: it serves torch.float16, torch.bfloat16, torch.float32"
    )
    assert step.refusal(noise(2, dtype=torch.float32)) is None
