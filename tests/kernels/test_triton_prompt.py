"""Kernels for the small operations of a prompt, against torch."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from turboquant_local.kernels import api

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from turboquant_local.kernels.triton import prompt_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("_poisoned")


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (70, 80), (33, 128)])
def test_rotary(tokens: int, size: int, dtype: torch.dtype) -> None:
    """To the bit: every rounding is where torch rounds. Tokens lie as a projection leaves them."""
    q, k = (noise(1, tokens, heads, size, dtype=dtype, seed=heads).transpose(1, 2) for heads in (4, 2))
    cos, sin = noise(2, 1, tokens, size, dtype=dtype)
    for expected, got in zip(apply_rotary_pos_emb(q, k, cos, sin), prompt_step.rotary(q, k, cos, sin), strict=True):
        assert torch.equal(expected, got)
        assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_swiglu_writes_over_the_gate(dtype: torch.dtype) -> None:
    gate, up = noise(2, 1, 33, 100, dtype=dtype) * 3
    expected = silu(gate) * up
    out = prompt_step.swiglu(gate, up)
    assert out is gate
    torch.testing.assert_close(out, expected, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [True, False])
def test_attention_to_two_sets_of_tokens(kernel: bool) -> None:
    """Merged by the logarithms of their sums, however far these lie apart."""
    q, k, v = noise(2, 50, 4, 48).transpose(1, 2), noise(2, 4, 90, 48) * 3, noise(2, 4, 90, 48, seed=1)
    parts = []
    for part in (slice(0, 60), slice(60, 90)):
        lse = (q @ k[:, :, part].mT * 48**-0.5).logsumexp(-1, keepdim=True)
        parts += [scaled_dot_product_attention(q, k[:, :, part], v[:, :, part]), lse]
    out = (prompt_step.merge if kernel else api.merge)(*parts)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)
