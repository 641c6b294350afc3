"""Keys with large biases, as Qwen2's have: plain TurboQuant at 3 bits breaks on them, and ours does not."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from turboquant_local.cache import TurboQuantCache

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "hard-keys-model"
LENGTH, CHUNK = 640, 32

PLAIN = (("preset", "paper"), ("k_bits", 3), ("v_bits", 3))
COMPACT = (("preset", "compact"),)


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()


@cache
def text_ids() -> torch.Tensor:
    """`[1, LENGTH]`: English that the model was not trained on, after an opening <|endoftext|>."""
    text = (ROOT / "LICENSE").read_text()
    ids = AutoTokenizer.from_pretrained(MODEL)(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([[0, *ids[: LENGTH - 1]]])


@cache
@torch.no_grad()
def mean_surprise(settings: tuple[tuple[str, Any], ...], padding: int = 0) -> float:
    """Mean of -log p over the text, in chunks through the cache, with so much padding on the left."""
    ids = torch.nn.functional.pad(text_ids(), (padding, 0))
    mask = torch.nn.functional.pad(torch.ones_like(text_ids()), (padding, 0))
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    held = TurboQuantCache(model().config, dict(settings))
    logits = []
    for start in range(0, ids.shape[1], CHUNK):
        stop = start + CHUNK
        inputs = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        logits.append(model()(ids[:, start:stop], past_key_values=held, use_cache=True, **inputs).logits.float())
    return torch.nn.functional.cross_entropy(torch.cat(logits, 1)[0, padding:-1], ids[0, padding + 1 :]).item()


def perplexity_rise(settings: tuple[tuple[str, Any], ...], padding: int = 0) -> float:
    """How much perplexity rises over the uncompressed cache: 0.01 is 1 %."""
    return math.exp(mean_surprise(settings, padding) - mean_surprise((("preset", "uncompressed"),), padding)) - 1


def test_the_biases_are_large() -> None:
    keys = TurboQuantCache(model().config, "uncompressed")
    with torch.no_grad():
        model()(text_ids(), past_key_values=keys)
    for layer, held in zip(model().model.layers, keys.layers, strict=True):
        bias = layer.self_attn.k_proj.bias.float().view(2, 128).norm(dim=-1)
        spread = (held.keys.float() - held.keys.float().mean(2, keepdim=True)).norm(dim=-1).mean((0, 2))
        assert (bias / spread).min() > 10


def test_plain_three_bits_break() -> None:
    assert perplexity_rise(PLAIN) > 0.5


@pytest.mark.parametrize("preset", ["balanced", "compact", "extreme"])
def test_ours_hold(preset: str) -> None:
    assert abs(perplexity_rise((("preset", preset),))) < 0.02


def test_it_is_centering_that_holds() -> None:
    assert perplexity_rise((*COMPACT, ("center_keys", False))) > 0.5
    assert perplexity_rise((*PLAIN, ("center_keys", True))) < 0.1


@pytest.mark.parametrize("padding", [130, 300])
def test_ours_hold_behind_padding(padding: int) -> None:
    """The sample that gives mean and unit of scales is padding but for two tokens, or altogether."""
    assert abs(perplexity_rise(COMPACT, padding)) < 0.01
