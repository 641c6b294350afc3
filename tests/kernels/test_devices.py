"""Where kernels run, and what is said when they do not."""

import importlib.util
import logging

import pytest
import torch

from turboquant_local.codec.quantizer import IdentityQuantizer, MSEQuantizer
from turboquant_local.codec.statistics import HeadStatistics
from turboquant_local.kernels import api, choice, reference
from turboquant_local.kernels.layout import KVView

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_where_the_tensors_are() -> None:
    """A model may be spread over several devices; the current one is the first."""
    near, far = (MSEQuantizer(64, bits, codebook="grid") for bits in (6, 4))
    x = torch.randn(2, 1, 2, 40, 64, generator=torch.Generator().manual_seed(0)).half()
    outs = []
    for device in ("cuda:0", "cuda:1"):
        assert torch.cuda.current_device() == 0
        sides = []
        for side in x.to(device):
            packed = api.requantize_kv(api.quantize_kv(side, near, impl="triton"), far, impl="triton")
            sides.append(KVView(sinks=side[:, :, :0], far=packed, near=None, recent=side[:, :, :3]))
            outs.append(api.dequantize_kv(packed, torch.float16, impl="triton").cpu())
        for tokens in (1, 12):
            query = x[0, :, :, :tokens].to(device)
            outs.append(api.attention(query, *sides, impl="triton").cpu())
    for first, second in zip(outs[:4], outs[4:], strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_what_torch_does_on_a_gpu_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    choice.say_slower.cache_clear()
    x, nothing = torch.ones(1, 1, 3, 64, device=DEVICE), HeadStatistics()
    with caplog.at_level(logging.WARNING):
        for quantizer in (MSEQuantizer(64, 4, codebook="lloyd_max"), IdentityQuantizer(64)):
            for _ in range(2):
                assert choice.implementation("quantize", "auto", True, x, quantizer, nothing) is reference
    assert [record.message for record in caplog.records] == [
        "quantize runs in torch, which is slower: codebook=lloyd_max: it serves grid"
    ]
