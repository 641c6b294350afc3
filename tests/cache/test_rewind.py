"""`rewind`: back to a point from which generation goes on as in a fresh cache."""

from __future__ import annotations

import pytest
import torch

from turboquant_local.cache import KVHandle, TurboQuantCache
from turboquant_local.testing import random_kv, random_tokens, tiny_model

FOUR_BITS = {"k_bits": 4, "v_bits": 4, "sink_length": 2, "residual_length": 8, "near_length": 16}
CONFIG = tiny_model("llama", num_hidden_layers=2).config


def tensors(cache: TurboQuantCache) -> list[torch.Tensor]:
    """Keys and values of all layers as plain tensors."""
    held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return [x.dequantize() if isinstance(x, KVHandle) else x for x in held]


def fed_by_the_prefill_rule(cache: TurboQuantCache, total: int, cached: int) -> None:
    """Feed tokens [cached, total) as the engine does: up to the end of the far tokens first."""
    keys, values = random_kv(CONFIG, 1, 400)
    window = cache.window_start(total - 1)
    for start, stop in ((cached, max(window, cached)), (max(window, cached), total)):
        if start < stop:
            for layer in range(2):
                cache.update(keys[:, :, start:stop], values[:, :, start:stop], layer)


@pytest.mark.parametrize("kept", [399, 250, 203, 141, 140, 133, 132, 131, 60, 3, 0])
@pytest.mark.parametrize("kv_cache", ["balanced", "identity", "paper", FOUR_BITS], ids=str)
def test_after_rewind_the_cache_is_as_a_fresh_one(kv_cache: object, kept: int) -> None:
    """The same prompt again, an edited one and a shorter one: the same codes as without a past."""
    for total in (kept + 1, 400):
        used, fresh = TurboQuantCache(CONFIG, kv_cache), TurboQuantCache(CONFIG, kv_cache)
        fed_by_the_prefill_rule(used, 400, 0)
        k = used.rewind(kept)
        assert k == used.get_seq_length() <= kept
        assert k in (0, used.window_start(kept))
        fed_by_the_prefill_rule(used, total, k)
        fed_by_the_prefill_rule(fresh, total, 0)
        for now, cold in zip(tensors(used), tensors(fresh), strict=True):
            assert torch.equal(now, cold)
        assert used.vram_bytes() == fresh.vram_bytes()


def test_rewind_beyond_the_end_keeps_everything() -> None:
    cache = TurboQuantCache(CONFIG, FOUR_BITS)
    fed_by_the_prefill_rule(cache, 45, 0)
    before = tensors(cache)[0]
    assert cache.rewind(45) == cache.rewind(1000) == 45
    assert torch.equal(tensors(cache)[0], before)


@pytest.mark.parametrize(
    ("name", "most"), [("gemma3", 0), ("mistral", 0), ("qwen3.5", 0), ("falcon-h1", 0), ("llama", 18)]
)
def test_rewind_resets_what_cannot_go_back(name: str, most: int) -> None:
    model = tiny_model(name)
    cache = TurboQuantCache(model.config, FOUR_BITS)
    with torch.no_grad():
        model(random_tokens(1, 60), past_key_values=cache)
        assert cache.rewind(40) == most == cache.get_seq_length()
        ids = random_tokens(1, 50, seed=1)
        logits = model(ids[:, most:], past_key_values=cache).logits[0, -1]
        if not most:
            fresh = TurboQuantCache(model.config, FOUR_BITS)
            assert torch.equal(logits, model(ids, past_key_values=fresh).logits[0, -1])


@pytest.mark.parametrize("length", range(0, 80, 7))
def test_window_start_is_where_the_far_tokens_end(length: int) -> None:
    cache = TurboQuantCache(CONFIG, FOUR_BITS)
    start = cache.window_start(length)
    assert 0 <= start <= length
    if length:
        raw = random_kv(CONFIG, 1, length)
        for layer in range(2):
            cache.update(*raw, layer)
        view = cache.layers[0]._k
        assert start == (2 + view.far.length if view.far else 0)
        exact = (tensors(cache)[0] == raw[0]).all(dim=-1)[0, 0].tolist()
        assert exact == [i < 2 or i >= view.sinks.shape[2] + view.packed_length for i in range(length)]


@pytest.mark.parametrize("kv_cache", ["balanced", {"near_length": 64}, "identity", "uncompressed", "paper"], ids=str)
@pytest.mark.parametrize("decoded", [0, 5, 40])
def test_a_repeated_prompt_gives_the_same_logits_to_the_bit(kv_cache: object, decoded: int) -> None:
    """What the first run saw exactly must not be seen packed by the second."""
    model = tiny_model("llama")
    ids = random_tokens(1, 295)

    def last_logits(cache: TurboQuantCache, start: int) -> torch.Tensor:
        window = cache.window_start(294)
        with torch.no_grad():
            for part in (ids[:, start:window], ids[:, max(window, start) :]):
                if part.shape[1]:
                    logits = model(part, past_key_values=cache).logits[0, -1]
            for token in random_tokens(1, decoded)[0]:
                model(token.view(1, 1), past_key_values=cache)
        return logits

    cache = TurboQuantCache(model.config, kv_cache)
    first = last_logits(cache, 0)
    for _ in range(2):
        assert torch.equal(last_logits(cache, cache.rewind(294)), first)
