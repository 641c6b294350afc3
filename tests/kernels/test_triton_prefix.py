"""What only prefix attention in Triton has: blocks, shares, decoded tiles; in the interpreter without a GPU."""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch

from turboquant_local.codec.quantizer import MSEQuantizer
from turboquant_local.errors import BackendError
from turboquant_local.kernels import api
from turboquant_local.kernels.layout import KVView, PackedKV

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("_poisoned")

from turboquant_local.kernels.triton import prefix_attention, prefix_kernel  # noqa: E402  after the skip
from turboquant_local.kernels.triton.prefix_attention import Launch  # noqa: E402

SETTINGS = {"mask": None, "causal": True, "scaling": 64**-0.5, "softcap": None}


@pytest.mark.parametrize(
    "launch",
    [
        Launch(rows=16, tokens=16, stages=1, shares=1),
        Launch(rows=32, tokens=32, stages=2, shares=2),
        Launch(rows=64, tokens=16, stages=1, shares=8),
    ],
    ids=["blocks", "two-shares", "eight-shares"],
)
def test_any_cut_of_the_work_gives_the_same(launch: Launch, case: Any) -> None:
    keys, values = case.views(150, 1, 64, 64, batch=1)
    query = case.queries(2, 37, 64, batch=1)
    logits = torch.tensor([1.0, -1.0], device=case.device)
    truth = case.exact(query, keys, values, case.causal(37, 150), None, logits)
    out = prefix_attention.attention(query, keys, values, **SETTINGS, sink_logits=logits, launch=launch)
    assert case.error(out, truth) < 2e-6


def test_queries_that_do_not_see_all_packed_tokens(case: Any) -> None:
    """Nothing says that the new tokens are in the window."""
    keys, values = case.views(90, 2, 64, 64)
    query = case.queries(2, 80, 64)
    assert keys.recent.shape[2] < 80
    truth = case.exact(query, keys, values, case.causal(80, 90))
    assert case.error(api.attention(query, keys, values, impl="triton"), truth) < 2e-6


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_centroids_that_are_no_grid(bits: int, dtype: torch.dtype, case: Any) -> None:
    quantizer = MSEQuantizer(64, bits)
    assert quantizer.codebook == "lloyd_max"
    k, v = (replace(side, far=None, near=packed(side, quantizer)) for side in case.views(90, 2, 64, 64, dtype=dtype))
    query = case.queries(4, 9, 64, dtype)
    truth = case.exact(query, k, v, case.causal(9, k.shape[2]))
    assert case.error(api.attention(query, k, v, impl="triton"), truth) < (2e-6 if dtype == torch.float32 else 1e-3)


def packed(side: KVView, quantizer: MSEQuantizer) -> PackedKV:
    """As many tokens as were near, anew."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*side.near.codes.shape[:3], quantizer.head_dim, generator=generator)
    part = api.quantize_kv(x.to(side.recent), quantizer, impl="reference")
    return replace(part, mean=side.near.mean)


def test_values_of_any_size(case: Any) -> None:
    """What is decoded is relative to the unit: float16 must not overflow, nor lose small values."""
    dtype = torch.float16
    keys, values = case.views(131, 1, 64, 64, dtype=dtype, batch=1)
    query = case.queries(1, 9, 64, dtype, batch=1)
    for factor in (2**-13, 2**10):
        far = replace(values.far, scale_unit=values.far.scale_unit * factor)
        near = replace(values.near, scales=values.near.scales * factor)
        scaled = replace(values, sinks=values.sinks * factor, far=far, near=near, recent=values.recent * factor)
        truth = case.exact(query, keys, scaled, case.causal(9, 131))
        out = api.attention(query, keys, scaled, impl="triton")
        assert case.error(out, truth) < (2e-3 if factor > 1 else 2e-2)  # float16 itself loses bits below 2**-14


@pytest.mark.parametrize(("start", "stop"), [(8, 30), (9, 28)])
def test_slices_of_a_larger_storage(start: int, stop: int, case: Any) -> None:
    keys, values = (
        replace(side, far=side.far.tokens(start, stop), near=side.near.tokens(0, stop - start))
        for side in case.views(163, 2, 64, 64)
    )
    query = case.queries(11, 4, 64).transpose(1, 2)
    truth = case.exact(query, keys, values, case.causal(11, keys.shape[2]))
    assert case.error(api.attention(query, keys, values, impl="triton"), truth) < 2e-6


def test_refusals_name_the_reason_and_auto_falls_back(case: Any) -> None:
    query = case.queries(4, 9, 64)
    keys, values = case.views(90, 2, 64, 64)
    lengths = torch.tensor([3, 32, 32, 23], dtype=torch.int32, device=case.device)
    keys, values = replace(keys, lengths=lengths), replace(values, lengths=lengths)
    with pytest.raises(BackendError, match="lengths on the device"):
        api.attention(query, keys, values, impl="triton")
    assert api.choose(query, keys, values) == "reference"
    with pytest.raises(BackendError, match="nothing is packed"):
        api.attention(query, *case.views(20, 2, 64, 64), impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; CI has none")
def test_the_length_compiles_nothing_anew(case: Any) -> None:
    def variants(*lengths: tuple[int, int]) -> int:
        for tokens, new in lengths:
            views = case.views(tokens, 2, 64, 64, dtype=torch.bfloat16)
            query = case.queries(4, new, 64, torch.bfloat16)
            prefix_attention.attention(query, *views, **SETTINGS, sink_logits=None, launch=Launch(shares=1))
        return sum(len(cache[0]) for cache in prefix_kernel.attend.device_caches.values())

    assert variants((150, 9), (182, 9)) == variants((151, 16), (214, 17), (500, 32), (1024, 33), (3003, 48))
