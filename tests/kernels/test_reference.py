"""The reference attention where it goes beyond the kernels: any number of queries, tile by tile."""

from typing import Any

import pytest
import torch

from turboquant_local.codec import MSEQuantizer
from turboquant_local.errors import CacheError
from turboquant_local.kernels import api
from turboquant_local.kernels.layout import KVView

SHAPES = [
    pytest.param((6, 1, 7, 200, 96, 96, 8, 4), id="chunk-mqa-d96-k8v4"),
    pytest.param((4, 2, 33, 150, 80, 64, 2, 3), id="chunk-gqa-k80v64-k2v3"),
    pytest.param((4, 2, 5, 90, 192, 128, 1, 16), id="chunk-gqa-k192v128-k1v16"),
    pytest.param((2, 2, 90, 90, 64, 64, 16, 16), id="all-at-once-identity"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("small_tiles", [False, True])
def test_chunks_of_queries_in_tiles_of_any_size(
    shape: tuple[int, ...], small_tiles: bool, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_tiles:
        monkeypatch.setattr("turboquant_local.kernels.reference._TILE_ELEMENTS", {"cpu": 1, "cuda": 1})
    query, keys, values, truth = case.of(shape)
    assert case.error(api.attention(query, keys, values, impl="reference"), truth) < 2e-6
    mask = case.causal(query.shape[2], keys.shape[2]).expand(2, 1, -1, -1)
    assert case.error(api.attention(query, keys, values, mask=mask, impl="reference"), truth) < 2e-6


def test_low_precision_queries_keep_their_dtype(case: Any) -> None:
    keys, values = case.views(100, 2, 64, 64, dtype=torch.bfloat16)
    query = case.queries(4, 1, 64, torch.bfloat16)
    out = api.attention(query, keys, values, impl="reference")
    assert out.dtype == torch.bfloat16
    assert case.error(out, case.exact(query, keys, values, case.causal(1, 100))) < 4e-3  # one rounding to bfloat16


def test_centering_makes_keys_with_a_bias_as_good_as_keys_without(case: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(1, 1, 400, 64, generator=generator)
    bias = torch.zeros(64).index_fill(0, torch.tensor([3]), 100.0)
    query = torch.randn(1, 1, 1, 64, generator=generator)
    values: KVView = case.view(torch.randn(1, 1, 400, 64, generator=generator), 16)

    def error(keys: torch.Tensor, center: bool) -> float:
        truth = case.exact(query, case.view(keys, 16), values, torch.ones(1, 400, dtype=torch.bool))
        out: float = case.error(api.attention(query, case.view(keys, 3, keys=center), values), truth)
        return out

    assert error(plain + bias, center=True) < 1.5 * error(plain, center=True)
    assert error(plain + bias, center=False) > 4 * error(plain, center=True)


def test_quantize_refuses_another_head_size_and_scales_without_a_unit() -> None:
    with pytest.raises(CacheError, match=r"\[batch, num_kv_heads, tokens, 128\]"):
        api.quantize_kv(torch.zeros(1, 1, 1, 64), MSEQuantizer(128, 4))
    with pytest.raises(CacheError, match="8-bit scales need a unit"):
        api.quantize_kv(torch.zeros(1, 1, 1, 128), MSEQuantizer(128, 4, scale_bits=8))
