"""On a CUDA device: the same codes, the same tokens, and the bytes the allocator really gives."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from turboquant_local import TurboQuantCache, predict_bytes
from turboquant_local.codec import MSEQuantizer, lloyd_max, unpack_codes
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


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_are_those_of_the_cpu_but_for_coordinates_on_a_boundary(bits: int) -> None:
    x = torch.randn(2, 4, 500, 128, generator=torch.Generator().manual_seed(0))
    quantizer = MSEQuantizer(128, bits)
    on_cpu, on_gpu = (api.quantize_kv(x.to(device), quantizer) for device in ("cpu", "cuda"))
    a, b = unpack_codes(on_cpu.codes, bits).int(), unpack_codes(on_gpu.codes, bits).int().cpu()
    differing = (a != b).nonzero(as_tuple=True)
    assert (a - b).abs().max() <= 1
    y = quantizer.rotate(x)[differing] / x.norm(dim=-1)[differing[:3]]
    boundary = lloyd_max(128, bits).boundaries.float()[torch.minimum(a, b)[differing].long()]
    assert torch.allclose(y, boundary, atol=1e-6)
    torch.testing.assert_close(on_cpu.scales, on_gpu.scales.cpu(), rtol=2e-3, atol=0)


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
