"""A prompt that goes through the layers in pieces leaves the cache as the whole does, and the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from turboquant_local.cache import TurboQuantCache
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
