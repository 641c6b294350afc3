"""Bytes are counted, not claimed: against the garbage collector, against a prediction, against transformers."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from turboquant_local.cache import TurboQuantCache, predict_bytes
from turboquant_local.errors import ConfigError
from turboquant_local.testing import PeakBytes, random_kv, random_tokens, reachable_bytes, tiny_model

pytestmark = pytest.mark.usefixtures("_one_thread")

SMALL = {"sink_length": 2, "residual_length": 8, "near_length": 16}


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    return tiny_model(name)


@torch.no_grad()
def feed(model: PreTrainedModel, cache: Cache, *lengths: int, batch_size: int = 2) -> None:
    for seed, length in enumerate(lengths):
        model(random_tokens(batch_size, length, seed=seed), past_key_values=cache)


def fill(config: PreTrainedConfig, cache: Cache, *lengths: int, batch_size: int = 1, dtype: torch.dtype) -> None:
    """Random keys and values for every layer, without running the model."""
    for seed, length in enumerate(lengths):
        for layer in range(config.num_hidden_layers):
            cache.update(*random_kv(config, batch_size, length, dtype=dtype, seed=seed), layer)


def prefill(model: PreTrainedModel, cache: Cache) -> None:
    feed(model, cache, 45)


def decode(model: PreTrainedModel, cache: Cache) -> None:
    feed(model, cache, 45, *[1] * 11)


def chunks(model: PreTrainedModel, cache: Cache) -> None:
    feed(model, cache, 13, 20, 30, 1)


def reorder(model: PreTrainedModel, cache: Cache) -> None:
    feed(model, cache, 45, 1)
    cache.reorder_cache(torch.tensor([1, 1]))


def repeat(model: PreTrainedModel, cache: Cache) -> None:
    feed(model, cache, 45, 1)
    cache.batch_repeat_interleave(3)


def select(model: PreTrainedModel, cache: Cache) -> None:
    feed(model, cache, 45, 1)
    cache.batch_select_indices(torch.tensor([1]))


def crop_window(model: PreTrainedModel, cache: Cache) -> None:
    feed(model, cache, 45)
    cache.crop(-2)


def crop_packed(model: PreTrainedModel, cache: Cache) -> None:
    feed(model, cache, 45)
    cache.crop(-21)


def crop_sinks(model: PreTrainedModel, cache: Cache) -> None:
    feed(model, cache, 45)
    cache.crop(-44)


def crop_and_go_on(model: PreTrainedModel, cache: Cache) -> None:
    feed(model, cache, 45)
    cache.crop(-21)
    feed(model, cache, 9, 1)


def reset(model: PreTrainedModel, cache: Cache) -> None:
    feed(model, cache, 45, 1)
    cache.reset()


def reset_and_go_on(model: PreTrainedModel, cache: Cache) -> None:
    feed(model, cache, 45, 1)
    cache.reset()
    feed(model, cache, 33, 1)


def offload(model: PreTrainedModel, cache: Cache) -> None:
    feed(model, cache, 45, 1)
    for index in range(len(cache)):
        cache.layers[index].offload()
        cache.layers[index].prefetch()


STATES = (
    prefill,
    decode,
    chunks,
    reorder,
    repeat,
    select,
    crop_window,
    crop_packed,
    crop_sinks,
    crop_and_go_on,
    reset,
    reset_and_go_on,
    offload,
)
# What transformers' own layers refuse: to crop a window that has moved on or a recurrent state, and to repeat or select
# the sequences of a recurrent state.
CROPS = (crop_window, crop_packed, crop_sinks, crop_and_go_on)
REFUSED = {"gemma3": CROPS, "mistral": CROPS, "qwen3.5": (*CROPS, repeat, select), "falcon-h1": CROPS}


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
@pytest.mark.parametrize(
    ("name", "kv_cache"),
    [
        pytest.param("llama", SMALL, id="llama-4bit"),
        pytest.param("llama", {**SMALL, "k_bits": 3, "v_bits": 2, "scale": "norm"}, id="llama-k3v2-norm"),
        pytest.param("llama", {"preset": "identity", **SMALL}, id="llama-identity"),
        pytest.param("llama", "paper", id="llama-paper"),
        pytest.param("llama", "uncompressed", id="llama-uncompressed"),
        pytest.param("llama", {**SMALL, "skip_first_layers": 1, "skip_last_layers": 1}, id="llama-skip"),
        pytest.param("qwen2", SMALL, id="qwen2-dense-rotation"),
        pytest.param("phi3", {**SMALL, "k_bits": 8}, id="phi3-k8v4"),
        pytest.param("gemma3", SMALL, id="gemma3-sliding"),
        pytest.param("mistral", SMALL, id="mistral-all-sliding"),
        pytest.param("qwen3.5", SMALL, id="qwen3.5-linear"),
        pytest.param("falcon-h1", SMALL, id="falcon-h1-hybrid-layers"),
        pytest.param("deepseek-v3", SMALL, id="deepseek-v3-mla"),
    ],
)
def test_vram_bytes_is_what_the_collector_reaches(
    name: str, kv_cache: dict[str, object] | str, state: Callable[[PreTrainedModel, Cache], None]
) -> None:
    model = model_of(name)
    cache = TurboQuantCache(model.config, kv_cache)
    if state in REFUSED.get(name, ()):
        with pytest.raises((RuntimeError, AttributeError)):
            state(model, cache)
    else:
        state(model, cache)
    assert cache.vram_bytes() == reachable_bytes(cache)
    report = dataclasses.asdict(cache.memory_report())
    parts = {name: report[name] for name in report if name not in ("total", "uncompressed")}
    assert sum(parts.values()) == report["total"] == cache.vram_bytes()


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3.5", "falcon-h1", "deepseek-v3"])
def test_an_empty_cache_holds_nothing_of_size(name: str) -> None:
    cache = TurboQuantCache(model_of(name).config, SMALL)
    assert cache.vram_bytes() == reachable_bytes(cache) <= 8 * len(cache)  # A sliding layer holds one integer.
    assert cache.compression_ratio() == 1.0


def test_a_deepcopy_has_bytes_of_its_own() -> None:
    model = model_of("llama")
    cache = TurboQuantCache(model.config, SMALL)
    prefill(model, cache)
    fork = copy.deepcopy(cache)
    assert fork.vram_bytes() == cache.vram_bytes() == reachable_bytes(fork)
    parts = cache.memory_report()
    assert reachable_bytes(cache, fork) >= 2 * parts.total - parts.constants


def test_a_handle_kept_by_the_caller_is_not_the_caches() -> None:
    model = model_of("llama")
    cache = TurboQuantCache(model.config, SMALL)
    prefill(model, cache)
    handle = cache.layers[0].keys
    cache.reset()
    assert cache.vram_bytes() == reachable_bytes(cache) == 0
    assert handle.dequantize().shape[2] == 45


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kv_cache",
    [
        pytest.param(None, id="default"),
        pytest.param({**SMALL, "k_bits": 3, "v_bits": 1}, id="k3v1-small"),
        pytest.param("identity", id="identity"),
        pytest.param("paper", id="paper"),
        pytest.param("uncompressed", id="uncompressed"),
        pytest.param({"skip_first_layers": 1, "skip_last_layers": 1, "k_bits": 8}, id="skip"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt-oss", "gemma3", "mistral"])
def test_prediction_is_the_live_figure(
    name: str, kv_cache: dict[str, object] | str | None, dtype: torch.dtype, batch_size: int
) -> None:
    config = model_of(name).config
    for tokens in (2, 23, 24, 25, 131, 132, 300):
        cache = TurboQuantCache(config, kv_cache)
        fill(config, cache, tokens - 1, 1, batch_size=batch_size, dtype=dtype)
        predicted = predict_bytes(config, kv_cache, tokens, batch_size=batch_size, dtype=dtype)
        assert predicted == cache.vram_bytes() == reachable_bytes(cache), f"{tokens} tokens"


def test_prediction_with_bits_of_single_layers() -> None:
    config, settings = model_of("llama").config, {**SMALL, "layer_bits": {0: (6, 2), 2: (3, 3)}}
    cache = TurboQuantCache(config, settings)
    fill(config, cache, 299, 1, batch_size=2, dtype=torch.bfloat16)
    packed = [layer._k.far.quantizer.bits for layer in cache.layers]  # type: ignore[union-attr]
    assert packed[:3] == [6, cache.kv_cache.k_bits, 3]
    assert predict_bytes(config, settings, 300, batch_size=2) == cache.vram_bytes() == reachable_bytes(cache)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_prediction_for_no_tokens(name: str) -> None:
    config = model_of(name).config
    assert predict_bytes(config, SMALL, 0) == TurboQuantCache(config, SMALL).vram_bytes()


@pytest.mark.parametrize("counts", [{"tokens": -1}, {"tokens": 1.5}, {"batch_size": 0}])
def test_counts_that_are_none_are_refused(counts: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(counts))}=.*at least"):
        predict_bytes(tiny_model("llama").config, **counts)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3.5", "falcon-h1", "deepseek-v3"])
def test_uncompressed_bytes_are_those_of_the_stock_cache(name: str) -> None:
    model = model_of(name)
    ours, stock = TurboQuantCache(model.config, SMALL), DynamicCache(config=model.config)
    for cache in (ours, stock):
        feed(model, cache, 45, 1)
    assert ours.uncompressed_bytes() == reachable_bytes(stock)
    assert ours.compression_ratio() == ours.uncompressed_bytes() / ours.vram_bytes()


@pytest.mark.parametrize("bits", [4, 3, 2, 1, 8])
def test_stored_bits_per_coordinate(bits: int) -> None:
    """Codes are as small as they say, with a scale of 8 bits up to 4 bits a coordinate, of 16 beyond."""
    config = tiny_model("llama", head_dim=128).config
    cache = TurboQuantCache(config, k_bits=bits, v_bits=bits, near_length=0)
    fill(config, cache, 4096, dtype=torch.bfloat16)
    parts = cache.memory_report()
    vectors = 2 * config.num_hidden_layers * config.num_key_value_heads * cache.kv_cache.packed_length(4096)
    assert 8 * (parts.codes + parts.scales) / (vectors * 128) == bits + (8 if bits <= 4 else 16) / 128
    means_and_weights, units = 2 * 128 * 2, 2 * 4 * (bits <= 4)
    assert parts.statistics == config.num_hidden_layers * config.num_key_value_heads * (means_and_weights + units)


def test_ratio_at_four_bits_counts_everything() -> None:
    config = tiny_model("llama", head_dim=128).config
    cache = TurboQuantCache(config, k_bits=4, v_bits=4)
    fill(config, cache, 3000, 1, dtype=torch.bfloat16)
    assert cache.compression_ratio() >= 3.4


def peak_of_decode_steps(dtype: torch.dtype, attention: str | None = None) -> float:
    """Highest ratio of the bytes alive to those of the cache, over three decode steps at 8K tokens."""
    model = tiny_model("llama", num_hidden_layers=8, head_dim=128).to(dtype)
    cache = TurboQuantCache(model.config, k_bits=4, v_bits=4)
    if attention is not None:
        model.set_attn_implementation(attention)
    fill(model.config, cache, 8194, dtype=dtype)
    # One of the steps packs a block: old and new codes of a layer are alive at once.
    assert cache.kv_cache.packed_length(8194) < cache.kv_cache.packed_length(8196)
    ratios = []
    for seed in range(3):
        with torch.no_grad(), PeakBytes(cache) as counted:
            model(random_tokens(1, 1, seed=seed), past_key_values=cache)
        ratios.append(counted.peak / cache.vram_bytes())
        assert counted.live == cache.vram_bytes()
    return max(ratios)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_peak_of_a_decode_step(dtype: torch.dtype) -> None:
    assert peak_of_decode_steps(dtype) < 1.3


def test_peak_of_a_decode_step_that_decompresses() -> None:
    """Else the test above could not fail."""
    assert peak_of_decode_steps(torch.bfloat16, attention="sdpa") > 1.3


def test_peak_of_a_decode_step_with_padding() -> None:
    model = tiny_model("llama", num_hidden_layers=8, head_dim=128)
    cache = TurboQuantCache(model.config, k_bits=4, v_bits=4)
    fill(model.config, cache, 4096, batch_size=2, dtype=torch.float32)
    mask = torch.ones(2, 4097, dtype=torch.long)
    mask[1, :1000] = 0
    with torch.no_grad(), PeakBytes(cache) as counted:
        model(random_tokens(2, 1), attention_mask=mask, past_key_values=cache)
    assert counted.peak < 1.3 * cache.vram_bytes()


def test_counters_on_what_is_known() -> None:
    class Holder:
        def __init__(self) -> None:
            base = torch.zeros(100)
            self.views = {"a": [base[:10], base[90:]]}
            self.itself = self

    holder = Holder()
    assert reachable_bytes(holder) == 400
    assert reachable_bytes(holder, torch.zeros(5), torch, lambda: holder) == 420
    with PeakBytes(holder) as counted:
        first = torch.ones(50)
        second = first[10:20] + 1
        del first
        holder.views["a"][0].add_(1)
    assert counted.peak == 400 + 200 + 40
    assert counted.live == 400 + 40
    assert second.sum() == 20
