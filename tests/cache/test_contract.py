"""Every method of a cache: with the identity codec as in transformers, with fewer bits on the codes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache, PreTrainedConfig

from turboquant_local.cache import KVHandle, TurboQuantCache
from turboquant_local.config import TurboQuantConfig
from turboquant_local.errors import CacheError
from turboquant_local.testing import random_kv, random_tokens, tiny_model

LENGTHS = {"sink_length": 2, "residual_length": 8, "near_length": 16}
IDENTITY = {"preset": "identity", **LENGTHS}
FOUR_BITS = {"k_bits": 4, "v_bits": 4, **LENGTHS}
CONFIG = tiny_model("llama", num_hidden_layers=2).config
HEADS, HEAD_DIM = CONFIG.num_key_value_heads, CONFIG.head_dim


def states(batch_size: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return random_kv(CONFIG, batch_size, length, seed=seed)


def tensors(cache: DynamicCache, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as plain tensors."""
    keys, values = cache.layers[layer].keys, cache.layers[layer].values
    return tuple(x.dequantize() if isinstance(x, KVHandle) else x for x in (keys, values))


def filled(kv_cache: object, config: PreTrainedConfig = CONFIG) -> TurboQuantCache:
    """Three sequences of 45 tokens, the same in every layer."""
    cache = TurboQuantCache(config, kv_cache)
    for layer in range(config.num_hidden_layers):
        cache.update(*states(3, 45), layer)
    return cache


@pytest.mark.parametrize(
    "kv_cache",
    [
        pytest.param(FOUR_BITS, id="4bit"),
        pytest.param({**FOUR_BITS, "rotation": "dense"}, id="4bit-dense"),
        pytest.param({**LENGTHS, "k_bits": 3, "v_bits": 2, "scale": "norm", "center_keys": False}, id="k3v2-plain"),
        pytest.param("paper", id="paper"),
    ],
)
@pytest.mark.parametrize(
    ("operation", "index"),
    [
        pytest.param(lambda c: c.crop(-1), lambda x: x[:, :, :-1], id="crop-window"),
        pytest.param(lambda c: c.crop(-7), lambda x: x[:, :, :-7], id="crop-into-packed"),
        pytest.param(lambda c: c.crop(-21), lambda x: x[:, :, :-21], id="crop-mid-block"),
        pytest.param(lambda c: c.crop(-43), lambda x: x[:, :, :2], id="crop-to-sinks"),
        pytest.param(lambda c: c.crop(-44), lambda x: x[:, :, :1], id="crop-into-sinks"),
        pytest.param(lambda c: c.crop(0), lambda x: x, id="crop-nothing"),
        pytest.param(lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), lambda x: x[[2, 0, 0]], id="reorder"),
        pytest.param(lambda c: c.batch_repeat_interleave(2), lambda x: x[[0, 0, 1, 1, 2, 2]], id="repeat"),
        pytest.param(lambda c: c.batch_select_indices(torch.tensor([2, 1])), lambda x: x[[2, 1]], id="select"),
        pytest.param(
            lambda c: c.batch_select_indices(torch.tensor([True, False, True])), lambda x: x[[0, 2]], id="select-mask"
        ),
        pytest.param(lambda c: [layer.offload() for layer in c.layers], lambda x: x, id="offload"),
    ],
)
def test_operation_on_packed_tokens(
    kv_cache: object,
    operation: Callable[[TurboQuantCache], None],
    index: Callable[[torch.Tensor], torch.Tensor],
    stored: Callable[[TurboQuantCache, int], list[torch.Tensor]],
) -> None:
    cache = filled(kv_cache)
    before = [stored(cache, layer) for layer in range(2)]
    operation(cache)
    for layer in range(2):
        for was, now in zip(before[layer], stored(cache, layer), strict=True):
            assert torch.equal(now, index(was))
    assert cache.get_seq_length() == index(before[0][0]).shape[2]
    assert cache.stats.materialized == 0


def test_tokens_after_a_crop_take_the_place_of_the_dropped() -> None:
    cache = filled(FOUR_BITS)
    before = tensors(cache)[0][:, :, :20]
    cache.crop(-25)
    new = states(3, 30, seed=1)
    for layer in range(2):
        cache.update(*new, layer)
    after = tensors(cache)[0]
    assert torch.equal(after[:, :, :20], before)
    assert cache.get_seq_length() == 50
    error = (after[:, :, 20:] - new[0]).norm() / new[0].norm()
    assert 0 < error < 0.12  # 4 bits: about 0.097 of a vector, the window exact.


def test_new_tokens_are_seen_exactly_before_they_are_packed() -> None:
    cache = filled(FOUR_BITS)
    new = states(3, 40, seed=1)
    for seen, fed in zip(cache.update(*new, 0), new, strict=True):
        assert torch.equal(seen.dequantize()[:, :, 45:], fed)
    assert not torch.equal(tensors(cache)[0][:, :, 45:], new[0])


@pytest.mark.parametrize("kv_cache", [IDENTITY, FOUR_BITS], ids=["identity", "4bit"])
def test_first_tokens_come_back_as_they_are(kv_cache: dict[str, object]) -> None:
    cache, new = TurboQuantCache(CONFIG, kv_cache), states(2, 45)
    keys, values = cache.update(*new, 0)
    assert type(keys) is type(values) is torch.Tensor
    assert torch.equal(keys, new[0])
    assert torch.equal(values, new[1])
    assert isinstance(cache.layers[0].keys, KVHandle)


def test_the_models_tensors_are_not_kept() -> None:
    cache, (keys, values) = TurboQuantCache(CONFIG, FOUR_BITS), states(2, 45)
    cache.update(keys, values, 0)
    before = tensors(cache)
    keys.zero_()
    values.zero_()
    for was, now in zip(before, tensors(cache), strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize("length", [0, 45])
def test_attributes_are_those_of_the_stock_cache(length: int) -> None:
    ours, stock = TurboQuantCache(CONFIG, IDENTITY), DynamicCache(config=CONFIG)
    if length:
        for cache in (ours, stock):
            for layer in range(2):
                cache.update(*states(1, length), layer)
    names = ("is_compileable", "is_croppable", "is_initialized", "is_sliding", "is_linear", "is_dummy", "batch_size")
    for name in names:
        if hasattr(stock, name):  # `is_dummy` is new in 5.23.
            assert getattr(ours, name) == getattr(stock, name), name
    for name in ("is_sliding", "is_compileable", "is_croppable", "supports_early_init", "is_initialized"):
        assert getattr(ours.layers[0], name) == getattr(stock.layers[0], name), name
    assert len(ours) == len(stock)
    assert ours.get_max_length() == stock.get_max_length() == -1
    assert ours.get_mask_sizes(5, 0) == stock.get_mask_sizes(5, 0) == (length + 5, 0)
    assert ours.get_query_offset() == stock.get_query_offset() == length


def test_early_initialization() -> None:
    ours, stock = TurboQuantCache(CONFIG, IDENTITY), DynamicCache(config=CONFIG)
    for cache in (ours, stock):
        cache.early_initialization(2, HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
        assert cache.is_initialized
        assert cache.get_seq_length() == 0
    new = states(2, 45)
    assert torch.equal(ours.update(*new, 0)[0] + 0, stock.update(*new, 0)[0])


def test_lazy_initialization_takes_dtype_and_device() -> None:
    cache = TurboQuantCache(CONFIG, IDENTITY)
    layer = cache.layers[0]
    assert not layer.is_initialized
    assert layer.keys is None
    assert layer.values is None
    layer.lazy_initialization(*(x.bfloat16() for x in states(2, 1)))
    assert layer.is_initialized
    assert (layer.dtype, layer.device) == (torch.bfloat16, torch.device("cpu"))
    assert layer.get_seq_length() == 0


def test_iteration_gives_what_the_stock_cache_gives() -> None:
    ours, stock = filled(IDENTITY), DynamicCache(config=CONFIG)
    for layer in range(2):
        stock.update(*states(3, 45), layer)
    for mine, theirs in zip(ours, stock, strict=True):
        assert len(mine) == len(theirs)
        assert torch.equal(mine[0] + 0, theirs[0])
        assert torch.equal(mine[1] + 0, theirs[1])


def test_crop_refuses_a_positive_number() -> None:
    cache = filled(FOUR_BITS)
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(10)
    assert cache.get_seq_length() == 45


def test_crop_of_more_than_there_is_empties() -> None:
    cache = filled(FOUR_BITS)
    cache.crop(-100)
    assert cache.get_seq_length() == 0
    cache.update(*states(3, 5), 0)
    assert torch.equal(cache.layers[0].keys, states(3, 5)[0])


def test_reset_forgets_and_the_next_batch_may_differ() -> None:
    cache = filled(FOUR_BITS)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.is_initialized
    for layer in range(2):
        cache.update(*states(1, 45, seed=1), layer)
    fresh = TurboQuantCache(CONFIG, FOUR_BITS)
    fresh.update(*states(1, 45, seed=1), 0)
    for now, cold in zip(tensors(cache), tensors(fresh), strict=True):
        assert torch.equal(now, cold)


def test_a_fork_does_not_touch_its_origin() -> None:
    cache = filled(FOUR_BITS)
    before = tensors(cache)
    fork = copy.deepcopy(cache)
    fork.update(*states(3, 30, seed=1), 0)
    fork.crop(-3)
    fork.layers[0].keys + 0
    for was, now in zip(before, tensors(cache), strict=True):
        assert torch.equal(was, now)
    assert cache.get_seq_length() == 45
    assert cache.stats.materialized == 0


def test_keys_cannot_be_assigned() -> None:
    cache = filled(FOUR_BITS)
    with pytest.raises(CacheError, match="update"):
        cache.layers[0].keys = torch.zeros(3, HEADS, 45, HEAD_DIM)


def test_skipped_layers_stay_exact_and_are_named() -> None:
    config = tiny_model("llama").config
    cache = filled({**FOUR_BITS, "skip_first_layers": 1, "skip_last_layers": 2}, config=config)
    assert set(cache.bypassed) == {"0", "2", "3"}
    raw = states(3, 45)[0]
    assert [torch.equal(tensors(cache, layer)[0], raw) for layer in range(4)] == [True, False, True, True]


@pytest.mark.parametrize(
    ("name", "bypassed"),
    [
        ("llama", {}),
        ("mistral", {"0": "sliding window", "1": "sliding window", "2": "sliding window", "3": "sliding window"}),
        ("gemma3", {"0": "sliding window", "2": "sliding window"}),
        ("qwen3.5", dict.fromkeys("0134", "linear attention")),
    ],
)
def test_bypassed_layers_are_named(name: str, bypassed: dict[str, str]) -> None:
    assert TurboQuantCache(tiny_model(name).config).bypassed == bypassed


def test_latent_attention_is_bypassed_with_its_reason() -> None:
    reasons = TurboQuantCache(tiny_model("deepseek-v3").config).bypassed
    assert sorted(reasons) == ["0", "1", "2", "3"]
    assert all("MLA" in reason for reason in reasons.values())


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"num_key_value_heads": 1}, id="heads"),
        pytest.param({"head_dim": 32}, id="head-dim"),
        pytest.param({"num_hidden_layers": 3}, id="too-few-layers"),
    ],
)
def test_a_cache_of_another_model_refuses(other: dict[str, int]) -> None:
    model = tiny_model("llama")
    cache = TurboQuantCache(tiny_model("llama", **other).config)
    with pytest.raises(CacheError, match=r"built for a model (of|with)"), torch.no_grad():
        model(random_tokens(1, 10), past_key_values=cache)


def test_a_batch_of_another_size_refuses() -> None:
    cache = filled(FOUR_BITS)
    with pytest.raises(CacheError, match="batch"):
        cache.update(*states(2, 1), 0)
    assert cache.get_seq_length() == 45


def test_a_cache_needs_a_models_config() -> None:
    with pytest.raises(CacheError, match=r"model\.config"):
        TurboQuantCache({"num_hidden_layers": 2})


def test_settings_of_the_cache_are_readable() -> None:
    cache = TurboQuantCache(CONFIG, "compact", sink_length=2)
    assert cache.kv_cache == TurboQuantConfig(preset="compact", sink_length=2)
    assert cache.kv_cache.k_bits == 3


def test_building_a_cache_turns_the_packed_attention_on() -> None:
    model = tiny_model("llama")
    assert model.config._attn_implementation == "sdpa"
    TurboQuantCache(model.config, "uncompressed")
    assert model.config._attn_implementation == "sdpa"
    TurboQuantCache(model.config)
    assert model.config._attn_implementation == "turboquant"
