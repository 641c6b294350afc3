"""Layers that are packed at once hold what each would by itself, in as many bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from turboquant_local import predict_bytes
from turboquant_local.cache import TurboQuantCache
from turboquant_local.cache.layer import settle
from turboquant_local.testing import reachable_bytes

LAYERS, HEADS, SIZE = 4, 2, 64
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=HEADS, head_dim=SIZE, hidden_size=256
)
Stored = Callable[[TurboQuantCache, int], list[torch.Tensor]]


def feed(tokens: torch.Tensor, alone: TurboQuantCache, together: TurboQuantCache) -> None:
    """Give both caches tokens `[layers, 2, batch, heads, length, size]`; the second one packs between the updates."""
    held, length = together.get_seq_length(), together.get_seq_length() + tokens.shape[4]
    settle(together.layers, length, among_first=held)
    for index, (k, v) in enumerate(tokens):
        alone.update(k, v, index)
        together.layers[index].packs = False
        together.update(k, v, index)
    for layer in together.layers:
        layer.packs = True
    settle(together.layers)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preset": "identity", "near_length": 32},
        {"preset": "paper"},
        {"layer_bits": {1: (6, 2), 3: (6, 2)}},
        {"sink_length": 2, "residual_length": 8, "near_length": 16},
    ],
    ids=str,
)
def test_the_same_codes(settings: dict[str, Any], batch: int, stored: Stored) -> None:
    """When packing begins, and behind far tokens."""
    generator = torch.Generator().manual_seed(0)
    alone, together = (TurboQuantCache(CONFIG, **settings) for _ in range(2))
    for length in (300, 1, 31, 200):
        feed(torch.randn(LAYERS, 2, batch, HEADS, length, SIZE, generator=generator), alone, together)
        for layer in range(LAYERS):
            for expected, got in zip(stored(alone, layer), stored(together, layer), strict=True):
                assert expected.shape == got.shape
                # Vectors of several layers are rotated at once, which may round otherwise: one may lie on a boundary.
                assert (expected != got).float().mean() < 1e-4
        assert together.vram_bytes() == together.memory_report().total == reachable_bytes(together)
        assert together.memory_report() == alone.memory_report()


def test_a_turn_that_is_known_beforehand(stored: Stored) -> None:
    """What the next tokens will push out is packed at once, and a layer's tokens can still be cut."""
    tokens = torch.randn(LAYERS, 2, 1, HEADS, 600, SIZE, generator=torch.Generator().manual_seed(1))
    alone, together = (TurboQuantCache(CONFIG) for _ in range(2))
    for index, (k, v) in enumerate(tokens):
        for part in (slice(0, 292), slice(292, 600)):
            alone.update(k[:, :, part], v[:, :, part], index)
        together.layers[index].packs = False
        together.update(k[:, :, :292], v[:, :, :292], index)
        together.layers[index].packs = True
    settle(together.layers, 600, among_first=292)
    assert together.layers[0]._k.far.length == 288
    assert together.layers[0]._k.near is None
    feed(tokens[..., 292:, :], TurboQuantCache(CONFIG), together)
    for cache in (alone, together):
        cache.crop(-250)
    for layer in range(LAYERS):
        for expected, got in zip(stored(alone, layer), stored(together, layer), strict=True):
            assert (expected != got).float().mean() < 1e-4
    assert together.vram_bytes() == reachable_bytes(together)
    assert alone.vram_bytes() == reachable_bytes(alone)


def test_statistics_wait_for_their_sample() -> None:
    """Tokens to come are no reason to take them of fewer."""
    cache = TurboQuantCache(CONFIG, residual_length=96, near_length=0)
    for index, (k, v) in enumerate(torch.randn(LAYERS, 2, 1, HEADS, 68, SIZE)):
        cache.update(k, v, index)
    settle(cache.layers, 140, among_first=68)
    assert not cache.layers[0].is_packed


def test_the_predicted_bytes() -> None:
    cache = TurboQuantCache(CONFIG)
    feed(torch.randn(LAYERS, 2, 1, HEADS, 700, SIZE), TurboQuantCache(CONFIG), cache)
    assert cache.vram_bytes() == predict_bytes(CONFIG, None, 700, dtype=torch.float32)
