"""The attention as transformers calls it: handles, plain tensors, and what neither path can do."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
)
from transformers.models.gemma2 import modeling_gemma2

from turboquant_local import TurboQuantCache
from turboquant_local.attention import turboquant_attention
from turboquant_local.cache import KVHandle
from turboquant_local.engine.decode_loop import DecodeLoop
from turboquant_local.errors import BackendError

SETTINGS = {"preset": "identity", "sink_length": 2, "residual_length": 8, "near_length": 16}


@pytest.fixture
def model() -> Gemma2ForCausalLM:
    """Softcap, and layers that slide beside layers that do not."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=16, attn_logit_softcapping=5.0, attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def run(model: Gemma2ForCausalLM, cache: DynamicCache, ids: torch.Tensor, **kwargs: object) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(part, past_key_values=cache, **kwargs).logits for part in ids.split([40, 9, 1], dim=1)]


def test_is_registered_with_its_mask() -> None:
    assert AttentionInterface()["turboquant"] is turboquant_attention
    assert AttentionMaskInterface()["turboquant"] is not None


def test_prefill_chunk_and_decode_equal_the_models_own_attention(model: Gemma2ForCausalLM) -> None:
    ids = torch.randint(0, 64, (2, 50), generator=torch.Generator().manual_seed(1))
    expected = run(model, DynamicCache(config=model.config), ids)
    cache = TurboQuantCache(model.config, SETTINGS)
    for ours, theirs in zip(run(model, cache, ids), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)
    assert cache.stats.attention == {"exact": 2, "reference": 4}  # two full-attention layers, three calls
    assert cache.stats.materialized == 0
    assert cache.bypassed == {"0": "sliding window", "2": "sliding window"}


def test_another_cache_works_with_the_registered_attention(model: Gemma2ForCausalLM) -> None:
    ids = torch.randint(0, 64, (1, 50), generator=torch.Generator().manual_seed(1))
    expected = run(model, DynamicCache(config=model.config), ids)
    model.set_attn_implementation("turboquant")
    for ours, theirs in zip(run(model, DynamicCache(config=model.config), ids), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)


def test_another_attention_works_with_the_cache_and_is_counted(model: Gemma2ForCausalLM) -> None:
    ids = torch.randint(0, 64, (1, 50), generator=torch.Generator().manual_seed(1))
    expected = run(model, DynamicCache(config=model.config), ids)
    cache = TurboQuantCache(model.config, SETTINGS, set_attention=False)
    assert model.config._attn_implementation == "eager"
    for ours, theirs in zip(run(model, cache, ids), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)
    assert cache.stats.materialized == 8  # keys and values, two layers, two calls on packed tokens


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gptj", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 16}),
        ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
        ("falcon", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
    ],
)
def test_a_model_with_an_attention_of_its_own_keeps_its_masks(name: str, fields: dict[str, int]) -> None:
    """It never asks for ours, so its config must not say that it does."""
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=64, **fields)).eval()
    for parameter in other.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    ids = torch.randint(0, 64, (1, 50), generator=torch.Generator().manual_seed(1))
    expected = run(other, DynamicCache(config=other.config), ids)
    cache = TurboQuantCache(other.config, SETTINGS)
    for ours, theirs in zip(run(other, cache, ids), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)
    assert cache.stats.materialized > 0
    assert "own" in DecodeLoop(capture=False).refusal(other, cache, GenerationConfig()) or name == "bloom"


def test_asking_for_weights_gives_them_from_the_models_own_attention(model: Gemma2ForCausalLM) -> None:
    keys, values = torch.randn(2, 1, 2, 30, 32, generator=torch.Generator().manual_seed(2))
    layer = TurboQuantCache(model.config, SETTINGS).layers[1]
    layer.update(keys, values)
    module = model.model.layers[1].self_attn
    query = torch.randn(1, 4, 1, 32, generator=torch.Generator().manual_seed(3))
    assert isinstance(layer.keys, KVHandle)
    out, weights = turboquant_attention(module, query, layer.keys, layer.values, None, output_attentions=True)
    packed, _ = turboquant_attention(module, query, layer.keys, layer.values, None)
    assert weights is not None
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 1))
    torch.testing.assert_close(out, packed, atol=1e-5, rtol=1e-4)


def test_what_no_path_can_do_is_refused(monkeypatch: pytest.MonkeyPatch, model: Gemma2ForCausalLM) -> None:
    monkeypatch.delattr(modeling_gemma2, "eager_attention_forward")
    module = model.model.layers[1].self_attn
    x = torch.zeros(1, 2, 3, 32)
    with pytest.raises(BackendError, match=r"Gemma2Attention: .*use DynamicCache with this model"):
        turboquant_attention(module, x, x, x, None, softcap=5.0)


def test_no_mask_where_tokens_see_all_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers would give a single token one of today's length while a graph is captured."""
    mask = AttentionMaskInterface()["turboquant"]
    monkeypatch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True)
    sizes = {"batch_size": 1, "kv_length": 9, "q_offset": 8}
    assert mask(**sizes, q_length=1) is None
    assert mask(**sizes, q_length=1, local_size=4).shape == (1, 1, 1, 9)
    assert mask(**sizes, q_length=1, attention_mask=torch.tensor([[0] + [1] * 8]).bool())[0, 0, 0].tolist()[0] is False
    assert mask(**{**sizes, "q_offset": 7}, q_length=2) is None
    assert mask(**{**sizes, "q_offset": 6}, q_length=2).sum(-1).tolist() == [[[7, 8]]]


@pytest.mark.parametrize("more", [{}, {"position_bias": torch.zeros(1, 4, 3, 9)}], ids=["plain", "biased"])
def test_tokens_behind_others_see_all_before_them(more: dict[str, torch.Tensor]) -> None:
    """Without a mask the triangle ends with the last key, not with the first ones as in transformers' own attention."""
    module = torch.nn.Identity()
    module.num_key_value_groups = 2
    query, key, value = (torch.randn(1, heads, tokens, 16) for heads, tokens in ((4, 3), (2, 9), (2, 9)))
    visible = torch.ones(3, 9, dtype=torch.bool).tril(6)[None, None]
    out, _ = turboquant_attention(module, query, key, value, None, **more)
    expected, _ = turboquant_attention(module, query, key, value, visible)
    torch.testing.assert_close(out, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("length", "before"), [(300, 700), (1024, 3072), (2, 5)])
def test_tokens_behind_others_on_a_gpu(dtype: torch.dtype, length: int, before: int) -> None:
    """Torch chooses cuDNN for some of these."""
    generator = torch.Generator().manual_seed(length)
    sizes = ((8, length), (2, before + length), (2, before + length))
    query, key, value = (torch.randn(1, *size, 128, generator=generator).cuda().to(dtype) for size in sizes)
    visible = torch.ones(length, before + length, dtype=torch.bool).tril(before).cuda()
    out, _ = turboquant_attention(torch.nn.Identity(), query, key, value, None)
    key, value = (x.double().repeat_interleave(4, 1) for x in (key, value))
    weights = (query.double() @ key.mT / 128**0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    expected = (weights @ value).transpose(1, 2)
    error = (out.double() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 2e-3}[dtype]
