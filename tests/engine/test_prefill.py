"""A prompt that goes through the layers in pieces leaves the cache as the whole does, and the model as it was."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from turboquant_local.cache import TurboQuantCache
from turboquant_local.engine import prefill as module
from turboquant_local.engine.prefill import prefill
from turboquant_local.testing import random_tokens, tiny_model


@pytest.mark.parametrize("split", [100, 260])
@pytest.mark.parametrize(
    ("name", "in_pieces"),
    [("llama", True), ("qwen2", True), ("qwen3", True), ("qwen3-moe", True), ("gemma3", False), ("falcon-h1", False)],
)
def test_the_same_cache(name: str, in_pieces: bool, split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(name), random_tokens(1, 300)
    lengths: list[int] = []
    attend = model.base_model.layers[0].self_attn.forward

    def watch(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(hidden_states.shape[1])
        return attend(hidden_states, *args, **kwargs)

    monkeypatch.setattr(model.base_model.layers[0].self_attn, "forward", watch)
    apart, pieces = (TurboQuantCache(model.config, "identity", near_length=0) for _ in range(2))
    with torch.no_grad():
        model(ids[:, :split], past_key_values=apart)
        expected = model(ids[:, split:], past_key_values=apart).logits[:, -1]
        lengths.clear()
        out = prefill(model, pieces, ids, split, piece=99)
        assert lengths == ([*([99] * (split // 99)), split % 99, 300 - split] if in_pieces else [split, 300 - split])
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert pieces.get_seq_length() == 300
        assert pieces.vram_bytes() == apart.vram_bytes()
        expected, out = (model(ids[:, :1], past_key_values=cache).logits for cache in (apart, pieces))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert all("forward" not in vars(layer) for layer in model.base_model.layers)


@pytest.mark.parametrize("split", [0, 300])
def test_one_part_alone(split: int) -> None:
    model, ids = tiny_model("llama"), random_tokens(1, 300)
    whole, pieces = (TurboQuantCache(model.config, "identity", near_length=0) for _ in range(2))
    with torch.no_grad():
        expected = model(ids, past_key_values=whole).logits[:, -1]
        torch.testing.assert_close(prefill(model, pieces, ids, split, piece=99), expected, rtol=1e-4, atol=1e-5)
        for cache in (whole, pieces):
            model(random_tokens(1, 40, seed=1), past_key_values=cache)
    assert pieces.vram_bytes() == whole.vram_bytes()


@pytest.mark.parametrize("piece", [None, 99])
@pytest.mark.parametrize("kv_cache", ["balanced", "paper"])
def test_the_same_numbers_again(kv_cache: str, piece: int | None) -> None:
    """A second, identical prompt over the far tokens of the first."""
    model, ids = tiny_model("llama"), random_tokens(1, 700)
    cache = TurboQuantCache(model.config, kv_cache)
    kept = cache.window_start(699)
    first = prefill(model, cache, ids, kept, piece)
    with torch.no_grad():
        model(random_tokens(1, 50, seed=2), past_key_values=cache)
    assert cache.rewind(699) == kept > 0
    assert torch.equal(prefill(model, cache, ids[:, kept:], 0, piece), first)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "falcon-h1"])
def test_turns(name: str) -> None:
    """Prompt after prompt, the cache is as if every layer had packed by itself."""
    model = tiny_model(name)
    ours, theirs = (TurboQuantCache(model.config, "identity", near_length=32) for _ in range(2))
    for turn, length in enumerate((20, 3, 150, 300, 40)):
        ids, held = random_tokens(1, length, seed=turn), ours.get_seq_length()
        split = max(0, ours.window_start(held + length - 1) - held)
        out = prefill(model, ours, ids, split)
        with torch.no_grad():
            for part in (ids[:, :split], ids[:, split:]):
                if part.shape[1]:
                    expected = model(part, past_key_values=theirs).logits[:, -1]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert ours.get_seq_length() == theirs.get_seq_length() == held + length
        assert ours.vram_bytes() == theirs.vram_bytes()


def test_another_cache_in_a_prompt_of_pieces() -> None:
    """A model may be shared: somebody else's tokens go through its layers as ever."""
    model, ids = tiny_model("llama"), random_tokens(1, 300)
    cache, other = (TurboQuantCache(model.config) for _ in range(2))
    attend = model.base_model.layers[1].self_attn.forward

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if not other.get_seq_length():
            model(ids[:, :150], past_key_values=other)
        return attend(*args, **kwargs)

    model.base_model.layers[1].self_attn.forward = interrupted
    prefill(model, cache, ids, 260, piece=99)
    del model.base_model.layers[1].self_attn.forward
    alone = TurboQuantCache(model.config)
    with torch.no_grad():
        model(ids[:, :150], past_key_values=alone)
    assert torch.equal(other.layers[3]._k.near.codes, alone.layers[3]._k.near.codes)
    assert other.get_seq_length() == 150
    assert cache.get_seq_length() == 300


@pytest.mark.parametrize("settings", [{"residual_length": 512}, {"preset": "identity", "sink_length": 0}], ids=str)
def test_one_head_of_keys(settings: dict[str, Any]) -> None:
    """Its tokens lie in memory as they are stored: still every layer has a copy of its own."""
    model, ids = tiny_model("llama", num_key_value_heads=1), random_tokens(1, 256)
    whole, pieces = (TurboQuantCache(model.config, near_length=0, **settings) for _ in range(2))
    with torch.no_grad():
        model(ids, past_key_values=whole)
        prefill(model, pieces, ids, 0, piece=200)
        expected, out = (model(ids[:, :1], past_key_values=cache).logits for cache in (whole, pieces))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert pieces.vram_bytes() == whole.vram_bytes()


def test_two_prompts_that_begin_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One goes through the layers in pieces, the other one whole."""
    model, ids, plain = tiny_model("llama"), random_tokens(1, 300), module._is_plain
    expected = prefill(model, TurboQuantCache(model.config), ids, 260)

    def slowly(layer: torch.nn.Module) -> bool:
        found = plain(layer)
        time.sleep(0.01)
        return found

    monkeypatch.setattr(module, "_is_plain", slowly)
    with ThreadPoolExecutor(2) as pool:
        run = [pool.submit(prefill, model, TurboQuantCache(model.config), ids, 260, 99) for _ in range(2)]
        for scores in run:
            torch.testing.assert_close(scores.result(), expected, rtol=1e-4, atol=1e-5)
    assert all("forward" not in vars(layer) for layer in model.base_model.layers)
