"""The kernels of a decode step round as transformers' own operations do."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from turboquant_local.kernels import api
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
def test_norm_of_a_sum(dtype: torch.dtype) -> None:
    x, residual = noise(1, 1, 1100, dtype=dtype), noise(1, 1100, 1, dtype=dtype).transpose(1, 2) * 3
    weight = noise(1100, dtype=dtype)
    total, out = step.add_rms_norm(x, residual, weight, 1e-5)
    tolerance = 0 if rounds_to_nearest(dtype) else 0.04
    torch.testing.assert_close(total, residual + x, rtol=tolerance, atol=tolerance)
    assert torch.equal(out, step.rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "other"), [(64, 64), (80, 128), (192, 128)])
def test_a_token_written_into_windows(size: int, other: int, dtype: torch.dtype) -> None:
    windows = [noise(2, 3, 5, n, dtype=dtype) for n in (size, other)]
    states = [noise(2, 1, 3 * n, dtype=dtype).view(2, 1, 3, n).transpose(1, 2) for n in (size, other)]
    for slot in (0, 4):
        at = torch.tensor([slot], device=DEVICE)
        expected = [window.index_copy(2, at, x) for window, x in zip(windows, states, strict=True)]
        step.write(*windows, at, *states)
        for window, truth in zip(windows, expected, strict=True):
            assert torch.equal(window, truth)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_that_start_early_wait_for_what_they_read(case: Any) -> None:
    """A chain, each link of which reads what the one before has just written, as one graph and one by one."""
    dtype = torch.bfloat16
    layers = [
        [
            replace(side, recent=side.recent.contiguous())
            for side in case.views(length, 8, 128, 128, dtype=dtype, batch=1)
        ]
        for length in range(300, 600, 40)
    ]
    slot, weight = torch.tensor([3], device=DEVICE), torch.ones(128, device=DEVICE, dtype=dtype)
    query = case.queries(32, 1, 128, dtype=dtype, batch=1)

    def chain(between: Callable[[], None]) -> torch.Tensor:
        x, out = query, []
        for keys, values in layers:
            api.write_token(keys.recent, values.recent, slot, x[:, :8], x[:, 8:16])
            between()
            x = api.attention(x, keys, values, impl="triton")
            between()
            x = step.rms_norm(x, weight, 1e-5)
            between()
            out.append(x)
        return torch.cat(out)

    expected = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(lambda: None)
    for _ in range(100):
        got.zero_()
        graph.replay()
        assert torch.equal(got, expected)


def test_what_is_refused() -> None:
    assert step.refusal(noise(2, dtype=torch.float64)) == (
        "dtype torch.float64: it serves torch.float16, torch.bfloat16, torch.float32"
    )
    assert step.refusal(noise(2, dtype=torch.float32)) is None
