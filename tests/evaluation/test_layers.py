"""Layer by layer, against the codec applied by hand and against transformers' own attention."""

import pytest
import torch
from transformers import DynamicCache

from turboquant_local import TurboQuantCache, TurboQuantConfig
from turboquant_local.evaluation.codecs.registry import find_codec
from turboquant_local.evaluation.codecs.turboquant import TurboQuantCodec
from turboquant_local.evaluation.layers import LayerFidelity, measure_layers
from turboquant_local.testing import random_tokens, tiny_model

LENGTH = 300


def measure(model: object, name: str, windows: int = 1, context: int = 100) -> list[LayerFidelity]:
    codec = find_codec(name)
    assert isinstance(codec, TurboQuantCodec)
    return measure_layers(model, random_tokens(windows, LENGTH), codec, context=context, chunk=32)


@pytest.mark.parametrize("near", [0, 96, 448])
def test_cosines_are_those_of_the_models_own_keys_and_values(near: int) -> None:
    """Over the far tokens; where there are none, over the near ones."""
    model, config = tiny_model("qwen2"), TurboQuantConfig(preset="extreme", near_length=near)
    found = measure(model, f"extreme:near_length={near}")
    exact = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(random_tokens(1, LENGTH), past_key_values=exact)
    compressed = TurboQuantCache(model.config, config, set_attention=False)
    packed = slice(4, 4 + (config.packed_length(LENGTH) - near if near < LENGTH else config.packed_length(LENGTH)))
    for index, layer in enumerate(exact.layers):
        compressed.update(layer.keys, layer.values, index)
        for side, got in (("keys", found[index].key_cosine), ("values", found[index].value_cosine)):
            read = getattr(compressed.layers[index], side).dequantize()[:, :, packed]
            cosine = torch.cosine_similarity(read, getattr(layer, side)[:, :, packed], dim=-1)
            assert got == pytest.approx(float(cosine.mean()), abs=1e-4)


def test_output_error_is_that_of_decoding() -> None:
    """The first layer sees exact inputs in decoding too: its attention output can be read there."""
    model = tiny_model("llama")
    ids, outputs = random_tokens(1, LENGTH), []
    found = measure(model, "compact", context=280)[0]
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.inference_mode():
        model(ids)
        cache = TurboQuantCache(model.config, "compact")
        for token in ids.T:
            model(token[:, None], past_key_values=cache)
    hook.remove()
    exact, decoded = outputs[0][:, 280:], torch.cat(outputs[1:], dim=1)[:, 280:]
    error = float((decoded - exact).norm() / exact.norm())
    assert found.output_error == pytest.approx(error, rel=0.02)


def test_fewer_bits_err_more_in_every_layer() -> None:
    model = tiny_model("llama")
    runs = [measure(model, name) for name in ("plain-turboquant-4", "plain-turboquant-3", "plain-turboquant-2")]
    for layers in zip(*runs, strict=True):
        errors = [layer.output_error or 0.0 for layer in layers]
        assert errors == sorted(errors)
        assert errors[0] > 0


def test_the_identity_codec_errs_nowhere() -> None:
    for layer in measure(tiny_model("gpt-oss"), "identity"):
        assert layer.bypassed or (layer.output_error or 0) < 1e-5
        assert layer.bypassed or (layer.key_cosine, layer.value_cosine) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "qwen3.5", "falcon-h1", "phi3", "deepseek-v3", "mistral"])
def test_every_layer_is_measured_or_says_why_not(name: str) -> None:
    model = tiny_model(name)
    found = measure(model, "balanced")
    assert [layer.layer for layer in found] == list(range(model.config.num_hidden_layers))
    bypassed = TurboQuantCache(model.config, "balanced", set_attention=False).bypassed
    for layer in found:
        assert layer.bypassed == bypassed.get(str(layer.layer))
        assert layer.bypassed or 0 < (layer.output_error or 0) < 0.5


def test_bits_and_bytes_are_those_of_a_cache() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    found = measure(model, "compact", windows=2)
    cache = TurboQuantCache(model.config, "compact")
    with torch.inference_mode():
        model(random_tokens(1, LENGTH), past_key_values=cache)
    memory = cache.memory_report()
    assert sum(layer.stored_bytes or 0 for layer in found) == memory.total - memory.constants
    assert sum(layer.uncompressed_bytes or 0 for layer in found) == memory.uncompressed
    packed = TurboQuantConfig(preset="compact").packed_length(LENGTH)
    plain = memory.sinks + memory.recent + memory.constants
    bits = 8 * (memory.total - plain) / (4 * 2 * 2 * 64 * packed)
    assert [layer.bits_per_coordinate for layer in found] == pytest.approx([bits] * 4)


def test_the_model_gets_its_attention_back() -> None:
    model = tiny_model("llama")
    measure(model, "balanced")
    assert model.config._attn_implementation == "sdpa"


def test_windows_are_averaged() -> None:
    model = tiny_model("llama")
    both = measure(model, "compact", windows=2)[1]
    codec = find_codec("compact")
    assert isinstance(codec, TurboQuantCodec)
    alone = [
        measure_layers(model, window[None], codec, context=100, chunk=32)[1] for window in random_tokens(2, LENGTH)
    ]
    assert both.key_cosine == pytest.approx(sum(layer.key_cosine or 0 for layer in alone) / 2)
    low, high = sorted(layer.output_error or 0 for layer in alone)
    assert low <= (both.output_error or 0) <= high
