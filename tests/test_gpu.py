"""On a CUDA device: the same codes, the same tokens, and the bytes the allocator really gives."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from turboquant_local import TurboQuantCache, predict_bytes
from turboquant_local.codec import MSEQuantizer
from turboquant_local.codec.statistics import HeadStatistics, head_statistics
from turboquant_local.kernels import api

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; CI has none"),
]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=32768, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().cuda()


@pytest.mark.parametrize(("near_bits", "bits", "weigh"), [(6, 4, True), (6, 3, True), (6, 4, False), (8, 6, False)])
def test_tokens_are_packed_as_on_the_cpu_but_for_ties(near_bits: int, bits: int, weigh: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 500, 128, generator=generator) + 2 * torch.randn(128, generator=generator)
    near, far = (MSEQuantizer(128, b, scale_bits=8 if b <= 4 else 16, codebook="grid") for b in (near_bits, bits))
    statistics = head_statistics(x, center=True, weigh=weigh, unit=True)
    packed = {}
    for device in ("cpu", "cuda"):
        known = HeadStatistics(*(None if part is None else part.to(device) for part in dataclasses.astuple(statistics)))
        new = api.quantize_kv(x.to(device), near, dataclasses.replace(known, weights=None))
        packed[device] = (new, api.requantize_kv(new, far, known))
    for on_cpu, on_gpu in zip(*packed.values(), strict=True):
        same = (on_cpu.codes == on_gpu.codes.cpu()).all(-1)
        assert same.float().mean() > 0.98
        scales = [part.scale_values().cpu()[same] for part in (on_cpu, on_gpu)]
        torch.testing.assert_close(*scales, rtol=0.03, atol=0)  # of 8 bits, a step


def test_codes_do_not_depend_on_how_tokens_arrived() -> None:
    x = torch.randn(2, 4, 1000, 128, generator=torch.Generator().manual_seed(0)).cuda()
    near, far = MSEQuantizer(128, 6, codebook="grid"), MSEQuantizer(128, 4, scale_bits=8, codebook="grid")
    statistics = head_statistics(x, center=True, weigh=True, unit=True)
    unweighted = dataclasses.replace(statistics, weights=None)
    whole = api.requantize_kv(api.quantize_kv(x, near, unweighted), far, statistics)
    for start, stop in ((0, 32), (32, 33), (33, 1000)):
        part = api.requantize_kv(api.quantize_kv(x[:, :, start:stop], near, unweighted), far, statistics)
        assert torch.equal(part.codes, whole.codes[:, :, start:stop])
        assert torch.equal(part.scales, whole.scales[:, :, start:stop])


def test_identity_gives_the_tokens_of_the_dynamic_cache(model: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 512, (2, 300), generator=torch.Generator().manual_seed(1)).cuda()
    mask = torch.ones_like(ids)
    mask[0, :70] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, past_key_values=DynamicCache(config=model.config), **kwargs)
    cache = TurboQuantCache(model.config, "identity", sink_length=2, residual_length=16, near_length=16)
    assert torch.equal(model.generate(ids, past_key_values=cache, **kwargs), expected)
    assert cache.stats.materialized == 0


def test_offloading_gives_the_same_tokens(model: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 512, (1, 300), generator=torch.Generator().manual_seed(1)).cuda()
    kwargs = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, past_key_values=TurboQuantCache(model.config), **kwargs)
    cache = TurboQuantCache(model.config, offloading=True)
    assert torch.equal(model.generate(ids, past_key_values=cache, **kwargs), expected)


def test_the_allocator_agrees_with_vram_bytes(model: LlamaForCausalLM) -> None:
    tokens = 8192
    TurboQuantCache(model.config).layers[0].update(*torch.randn(2, 1, 2, 300, 128).cuda())  # constants are made once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache = TurboQuantCache(model.config)
    for layer in cache.layers:
        layer.update(*torch.randn(2, 1, 2, tokens, 128, device="cuda"))
    torch.cuda.synchronize()
    live = torch.cuda.memory_allocated() - before
    constants = cache.memory_report().constants
    assert cache.vram_bytes() == predict_bytes(model.config, None, tokens, dtype=torch.float32)
    assert live == pytest.approx(cache.vram_bytes() - constants, rel=0.01)
    torch.cuda.reset_peak_memory_stats()
    step = torch.randint(0, 512, (1, 1)).cuda()
    weights_and_rest = torch.cuda.memory_allocated() - cache.vram_bytes()
    with torch.no_grad():
        model(step, past_key_values=cache)
    assert torch.cuda.max_memory_allocated() - weights_and_rest < 1.3 * cache.vram_bytes()
