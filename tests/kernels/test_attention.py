"""Attention over packed tokens against float64 over the decompressed ones, in every implementation."""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch

from turboquant_local.errors import BackendError, CacheError
from turboquant_local.kernels import api

TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
pytestmark = [
    pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=TRITON)]),
    pytest.mark.usefixtures("_poisoned"),
]

SHAPES = [
    # q_heads, heads, q_length, tokens, k_dim, v_dim, k_bits, v_bits
    pytest.param((8, 2, 1, 403, 128, 128, 4, 4), id="gqa-d128-k4v4"),
    pytest.param((4, 4, 1, 63, 64, 64, 3, 2), id="mha-d64-k3v2"),
    pytest.param((6, 1, 7, 200, 96, 96, 8, 4), id="mqa-7-queries-d96-k8v4"),
    pytest.param((2, 2, 2, 150, 80, 64, 2, 3), id="mha-2-queries-k80v64-k2v3"),
    pytest.param((4, 2, 5, 90, 192, 128, 1, 16), id="gqa-5-queries-k192v128-k1v16"),
    pytest.param((2, 1, 8, 90, 256, 256, 16, 1), id="gqa-8-queries-d256-k16v1"),
    pytest.param((2, 2, 1, 90, 64, 64, 16, 16), id="mha-identity"),
    pytest.param((4, 2, 1, 110, 96, 128, 6, 6), id="gqa-k96v128-k6v6"),
    pytest.param((8, 2, 20, 303, 128, 128, 4, 4), id="gqa-20-queries-d128-k4v4"),
    pytest.param((4, 4, 9, 63, 64, 64, 3, 2), id="mha-9-queries-d64-k3v2"),
    pytest.param((6, 1, 13, 140, 96, 96, 8, 4), id="mqa-13-queries-d96-k8v4"),
    pytest.param((2, 2, 40, 150, 80, 64, 2, 3), id="mha-40-queries-k80v64-k2v3"),
    pytest.param((4, 2, 11, 90, 192, 128, 1, 16), id="gqa-11-queries-k192v128-k1v16"),
    pytest.param((2, 1, 10, 90, 256, 256, 16, 1), id="gqa-10-queries-d256-k16v1"),
    pytest.param((2, 2, 30, 90, 64, 64, 16, 16), id="mha-30-queries-identity"),
    pytest.param((4, 2, 12, 110, 96, 128, 6, 6), id="gqa-12-queries-k96v128-k6v6"),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_width(impl: str, shape: tuple[int, ...], case: Any) -> None:
    query, keys, values, truth = case.of(shape)
    assert case.error(api.attention(query, keys, values, impl=impl), truth) < 2e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; CI has none")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_is_no_worse_than_its_rounding(
    impl: str, shape: tuple[int, ...], dtype: torch.dtype, case: Any
) -> None:
    query, keys, values, truth = case.of(shape, dtype)
    out = api.attention(query, keys, values, impl=impl)
    assert out.dtype == dtype
    assert case.error(out, truth) < (1e-3 if dtype == torch.float16 else 4e-3)
    assert torch.equal(out, api.attention(query, keys, values, impl=impl))


@pytest.mark.parametrize(("head_dim", "k_bits", "v_bits"), [(128, 4, 3), (64, 8, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_levels_of_the_paper(impl: str, dtype: torch.dtype, head_dim: int, k_bits: int, v_bits: int, case: Any) -> None:
    keys, values = case.views(131, 1, head_dim, head_dim, k_bits, v_bits, dtype, codebook="lloyd_max")
    query = case.queries(2, 1, head_dim, dtype)
    truth = case.exact(query, keys, values, case.causal(1, 131))
    assert case.error(api.attention(query, keys, values, impl=impl), truth) < (2e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("q_length", [2, 11])
def test_masks_of_both_kinds_for_all_heads_and_for_each(impl: str, q_length: int, case: Any) -> None:
    keys, values = case.views(163, 2, 64, 64)
    query = case.queries(4, q_length, 64)
    mask = case.causal(q_length, 163).repeat(2, 1, 1, 1)
    mask[0, ..., :150] = False  # left padding: all packed tokens, and some of the window
    truth = case.exact(query, keys, values, mask)
    assert case.error(api.attention(query, keys, values, mask=mask, impl=impl), truth) < 2e-6
    wider = torch.nn.functional.pad(mask, (0, 5))
    assert case.error(api.attention(query, keys, values, mask=wider, impl=impl), truth) < 2e-6
    additive = torch.zeros(mask.shape, device=case.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert case.error(api.attention(query, keys, values, mask=additive, impl=impl), truth) < 2e-6
    each = torch.rand(1, 4, q_length, 163, device=case.device) > 0.3
    out = api.attention(query, keys, values, mask=each, impl=impl)
    assert case.error(out, case.exact(query, keys, values, each)) < 2e-6


@pytest.mark.parametrize("q_length", [1, 9])
def test_a_query_that_sees_nothing_gets_zero(impl: str, q_length: int, case: Any) -> None:
    keys, values = case.views(90, 2, 64, 64)
    mask = case.causal(q_length, 90).repeat(2, 1, 1, 1)
    mask[1] = False
    out = api.attention(case.queries(4, q_length, 64), keys, values, mask=mask, impl=impl)
    assert out[0].isfinite().all()
    assert torch.equal(out[1], torch.zeros_like(out[1]))


@pytest.mark.parametrize("q_length", [3, 10])
def test_softcap_and_sink_logits(impl: str, q_length: int, case: Any) -> None:
    keys, values = case.views(131, 2, 64, 64)
    query = 5 * case.queries(6, q_length, 64)
    logits = torch.linspace(-2, 6, 6, device=case.device)
    truth = case.exact(query, keys, values, case.causal(q_length, 131), 7.0, logits)
    out = api.attention(query, keys, values, softcap=7.0, sink_logits=logits, impl=impl)
    assert case.error(out, truth) < 2e-6


@pytest.mark.parametrize("q_length", [7, 17])
def test_not_causal_sees_everything(impl: str, q_length: int, case: Any) -> None:
    keys, values = case.views(131, 2, 64, 64)
    query = case.queries(4, q_length, 64)
    truth = case.exact(query, keys, values, torch.ones(q_length, 131, dtype=torch.bool, device=case.device))
    assert case.error(api.attention(query, keys, values, causal=False, impl=impl), truth) < 2e-6


def test_refusals(impl: str, case: Any) -> None:
    keys, values = case.views(131, 2, 64, 64)
    query = case.queries(4, 1, 64)
    with pytest.raises(BackendError, match=r"impl='cuda': this installation has reference"):
        api.attention(query, keys, values, impl="cuda")
    with pytest.raises(CacheError, match="multiple of their heads"):
        api.attention(query[:, :3], keys, values, impl=impl)
    mask = torch.ones(2, 1, 1, 100, dtype=torch.bool, device=case.device)
    with pytest.raises(CacheError, match="of 131 keys or more"):
        api.attention(query, keys, values, mask=mask, impl=impl)
    with pytest.raises(CacheError, match="only keys can be centred"):
        api.attention(query, keys, keys, impl=impl)
    shorter = replace(values, near=None, recent=values.recent.repeat(1, 1, 3, 1)[:, :, : values.recent.shape[2] + 32])
    with pytest.raises(CacheError, match="parts of equal lengths"):
        api.attention(query, keys, shorter, impl=impl)
