"""`KVHandle`: what the cache gives in place of decompressed keys and values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from turboquant_local.cache import TurboQuantCache
from turboquant_local.testing import random_kv, tiny_model

CONFIG = tiny_model("llama", num_hidden_layers=1).config


def filled() -> TurboQuantCache:
    """Three sequences of 45 tokens, most of them packed."""
    cache = TurboQuantCache(CONFIG, k_bits=4, v_bits=4, sink_length=2, residual_length=8, near_length=16)
    cache.update(*random_kv(CONFIG, 3, 45), 0)
    return cache


@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(lambda h: h + 0, id="add"),
        pytest.param(lambda h: 0 + h, id="radd"),
        pytest.param(lambda h: h[:, :, 3:], id="slice"),
        pytest.param(lambda h: h.transpose(1, 2), id="transpose"),
        pytest.param(lambda h: torch.cat([h, torch.ones(3, 2, 1, 64)], dim=2), id="cat"),
        pytest.param(lambda h: h.float().to(torch.bfloat16), id="to"),
        pytest.param(lambda h: torch.matmul(torch.ones(3, 2, 1, 64), h.mT), id="matmul"),
        pytest.param(lambda h: h.clone(), id="clone"),
        pytest.param(lambda h: h.repeat_interleave(2, dim=1), id="repeat-interleave"),
        pytest.param(lambda h: h.sum(), id="sum"),
        pytest.param(lambda h: torch.stack([h, h])[0], id="list-of-handles"),
    ],
)
def test_an_operation_on_a_handle_decompresses_and_is_counted(
    operation: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    cache = filled()
    handle, plain = cache.layers[0].keys, cache.layers[0].keys.dequantize()
    assert cache.stats.materialized == 0
    result = operation(handle)
    assert type(result) is torch.Tensor
    assert torch.equal(result, operation(plain))
    assert cache.stats.materialized > 0
    cache.stats.reset()
    assert cache.stats.materialized == 0


def test_a_handle_describes_itself_without_decompressing() -> None:
    cache = filled()
    handle = cache.layers[0].values
    assert isinstance(handle, torch.Tensor)
    assert handle.shape == (3, 2, 45, 64)
    assert (handle.size(-2), handle.ndim, handle.dim(), len(handle)) == (45, 4, 4, 3)
    assert handle.numel() == 3 * 2 * 45 * 64
    assert (handle.dtype, handle.device) == (torch.float32, torch.device("cpu"))
    assert not handle.requires_grad
    assert "45" in repr(handle)
    assert cache.stats.materialized == 0


def test_a_handle_is_a_snapshot() -> None:
    cache = filled()
    handle = cache.layers[0].keys
    before = handle.dequantize()
    cache.update(*random_kv(CONFIG, 3, 30, seed=1), 0)
    cache.crop(-60)
    cache.reorder_cache(torch.tensor([1, 1, 1]))
    cache.reset()
    assert torch.equal(handle.dequantize(), before)
