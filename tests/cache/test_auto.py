"""`preset="auto"`: what it chooses for real architectures, and what it says about it."""

import logging
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from turboquant_local.cache import TurboQuantCache, predict_bytes
from turboquant_local.cache.auto import _log_once, choose, has_key_bias
from turboquant_local.config import PRESETS, TurboQuantConfig
from turboquant_local.errors import ConfigError
from turboquant_local.testing import TINY_MODELS, random_tokens, tiny_model

LLAMA_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}


def config_of(model_type: str, **fields: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.for_model(model_type, **fields)
    return config


def test_a_large_model_without_peculiarities_gets_the_safe_choice() -> None:
    choice = choose(TurboQuantConfig.parse("auto"), config_of("llama", **LLAMA_8B))
    assert choice.kv_cache == TurboQuantConfig.parse("balanced")
    assert choice.explanation == (
        "llama: preset 'balanced' is chosen. 4 bits are the safe choice. Nothing in its shape speaks against preset "
        "'compact' (3 bits): test it."
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (config_of("llama", **LLAMA_8B, head_dim=64), "A head size of 64 leaves few coordinates"),
        (config_of("qwen3", hidden_size=1024, num_attention_heads=16, head_dim=128), "1024 marks a small model"),
        (config_of("llama", **{**LLAMA_8B, "num_key_value_heads": 4}), "8 query heads read each key head"),
    ],
    ids=["head size", "width", "group"],
)
def test_what_speaks_against_fewer_bits_is_named(config: PreTrainedConfig, reason: str) -> None:
    choice = choose(TurboQuantConfig.parse("auto"), config)
    assert choice.kv_cache.preset == "balanced"
    assert reason in choice.explanation
    assert choice.explanation.endswith("So 4 bits, and no fewer.")


def test_biases_on_keys_get_more_bits() -> None:
    qwen = {**LLAMA_8B, "num_attention_heads": 28, "hidden_size": 3584, "num_key_value_heads": 4}
    choice = choose(TurboQuantConfig.parse("auto"), config_of("qwen2", **qwen))
    assert choice.kv_cache == TurboQuantConfig.parse("turboquant_k8v4")
    assert choice.kv_cache.center_keys
    assert choice.explanation == (
        "qwen2: preset 'turboquant_k8v4' is chosen. Its keys have a bias. Centering takes it off but for what turns "
        "with the position, so keys have 8 bits."
    )
    without = choose(TurboQuantConfig.parse("auto"), config_of("qwen3", **qwen))
    assert (without.kv_cache.preset, "bias" in without.explanation) == ("balanced", False)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_bias_is_found_where_the_model_has_one(name: str) -> None:
    model = tiny_model(name)
    projections = [n for n, _ in model.named_parameters() if n.endswith(("k_proj.bias", "qkv_proj.bias"))]
    assert has_key_bias(model.config) == bool(projections)


@pytest.mark.parametrize(
    ("model_type", "has_bias"),
    [
        ("phi", True),
        ("gpt2", True),
        ("qwen2_moe", True),
        ("starcoder2", True),
        ("glm4", True),
        ("llama", False),
        ("qwen3_moe", False),
        ("phi3", False),
    ],
)
def test_a_bias_is_told_from_type_or_fields(model_type: str, has_bias: bool) -> None:
    assert has_key_bias(config_of(model_type)) is has_bias


@pytest.mark.parametrize(
    ("model", "reason"),
    [("mistral", "No layer has full attention"), ("deepseek-v3", "Its attention is MLA")],
)
def test_where_nothing_can_be_compressed_it_says_so(model: str, reason: str) -> None:
    cache = TurboQuantCache(tiny_model(model).config, "auto")
    assert cache.kv_cache == TurboQuantConfig.parse("uncompressed")
    assert reason in cache.explanation
    assert len(cache.bypassed) == len(cache.layers)


def test_a_head_size_that_fills_no_bytes_stays_uncompressed() -> None:
    config = config_of("llama", hidden_size=36, num_attention_heads=3, num_hidden_layers=2)
    cache = TurboQuantCache(config, "auto")
    assert cache.kv_cache.preset == "uncompressed"
    assert "Head size 12 is no multiple of 8" in cache.explanation
    assert cache.bypassed == {"0": "head size 12 is no multiple of 8", "1": "head size 12 is no multiple of 8"}


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("gemma2", "2 of 4 layers have full attention and are compressed; 2 sliding-window ones stay as is."),
        ("qwen3.5", "2 of 6 layers have full attention and are compressed; 4 recurrent ones stay as is."),
    ],
)
def test_mixed_layers_are_counted(model: str, layers: str) -> None:
    cache = TurboQuantCache(tiny_model(model).config, "auto")
    assert cache.kv_cache.preset == "balanced"
    assert layers in cache.explanation


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_architecture_gets_a_preset_that_exists(name: str) -> None:
    cache = TurboQuantCache(tiny_model(name).config, "auto", set_attention=False)
    assert cache.kv_cache == TurboQuantConfig.parse(cache.kv_cache.preset)
    assert cache.kv_cache.preset in PRESETS
    assert cache.explanation.startswith(f"{tiny_model(name).config.model_type}: preset ")


def test_fields_beside_it_stay_as_given() -> None:
    cache = TurboQuantCache(config_of("llama", **LLAMA_8B), {"preset": "auto", "v_bits": 3}, skip_first_layers=1)
    assert cache.kv_cache == TurboQuantConfig(preset="balanced", v_bits=3, skip_first_layers=1)
    assert cache.explanation.endswith("As given: v_bits=3, skip_first_layers=1.")
    assert cache.bypassed == {"0": "skip_first_layers or skip_last_layers"}


def test_a_named_preset_is_taken_at_its_word() -> None:
    cache = TurboQuantCache(tiny_model("llama").config, "compact")
    assert cache.kv_cache == TurboQuantConfig.parse("compact")
    assert cache.explanation == ""


def test_before_the_model_is_known_it_is_a_plain_setting() -> None:
    config = TurboQuantConfig.parse({"preset": "auto"}, v_bits=3)
    assert config.to_dict() == {"preset": "auto", "v_bits": 3}
    assert TurboQuantConfig.parse(config.to_dict()) == config
    assert TurboQuantConfig.parse(config, k_bits=8).to_dict() == {"preset": "auto", "k_bits": 8, "v_bits": 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "auto", "k_bits": 7}, "k_bits=7: expected one of"),
        ({"preset": "auto", "near_length": 5}, "near_length=5: expected a multiple"),
        ({"preset": "auto", "kbits": 3}, "did you mean 'k_bits'"),
        ("atuo", "expected one of balanced.*, auto .did you mean 'auto'"),
    ],
)
def test_bad_fields_are_named_at_once(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TurboQuantConfig.parse(settings)


def test_it_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    _log_once.cache_clear()
    config = tiny_model("qwen2").config
    with caplog.at_level(logging.INFO, logger="turboquant_local"):
        caches = [TurboQuantCache(config, "auto") for _ in range(3)]
    assert [record.getMessage() for record in caplog.records] == [caches[0].explanation]


def test_bytes_are_predicted_and_used_as_with_the_preset_it_chose() -> None:
    model = tiny_model("qwen2")
    assert predict_bytes(model.config, "auto", tokens=700) == predict_bytes(model.config, "turboquant_k8v4", tokens=700)
    prompt, sizes = random_tokens(1, 400), []
    for settings in ("auto", "turboquant_k8v4"):
        cache = TurboQuantCache(model.config, settings)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=2)
        sizes.append(cache.vram_bytes())
    assert sizes[0] == sizes[1] < cache.uncompressed_bytes()
