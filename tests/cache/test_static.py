"""The static form of the cache: the tokens and codes of the snapshot form, in buffers that stay where they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from turboquant_local.attention import turboquant_attention
from turboquant_local.cache import KVHandle, TurboQuantCache
from turboquant_local.cache.static import StaticStorage, begins_packing, static_refusal, window_length
from turboquant_local.errors import CacheError
from turboquant_local.testing import reachable_bytes, tiny_model

LAYERS, HEADS, SIZE = 2, 2, 64
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=HEADS, head_dim=SIZE, hidden_size=256
)
SETTINGS: dict[str, dict[str, Any]] = {
    "balanced": {},
    "identity": {"preset": "identity", "near_length": 32},
    "paper": {"preset": "paper"},
    "keys of 8 bits": {"k_bits": 8, "near_length": 64, "residual_length": 48},
    "nothing near": {"k_bits": 3, "v_bits": 2, "near_length": 0, "sink_length": 0, "residual_length": 8},
    "bits by layer": {"layer_bits": {1: (6, 2)}},
    "small": {"sink_length": 2, "residual_length": 8, "near_length": 16},
}
MODULE = torch.nn.Identity()
MODULE.num_key_value_groups = 2  # type: ignore[assignment]
Stored = Callable[[TurboQuantCache, int], list[torch.Tensor]]


class Pair:
    """Two caches that are given the same tokens: one stays in the snapshot form."""

    def __init__(self, length: int, settings: dict[str, Any], batch: int = 1) -> None:
        self.generator = torch.Generator().manual_seed(length)
        self.batch = batch
        self.snapshot, self.other = (TurboQuantCache(CONFIG, **settings) for _ in range(2))
        self.storage: StaticStorage | None = None
        self.eager_steps = 0
        self.feed(length)

    def feed(self, length: int) -> None:
        """Several tokens at once."""
        assert self.storage is None
        for layer, (k, v) in enumerate(self.tokens(length)):
            self.snapshot.update(k, v, layer)
            self.other.update(k, v, layer)

    def tokens(self, length: int) -> torch.Tensor:
        """`[layers, 2, batch, heads, length, size]`."""
        return torch.randn(LAYERS, 2, self.batch, HEADS, length, SIZE, generator=self.generator)

    def decode(self, steps: int, far_capacity: int = 640) -> None:
        """Tokens one by one, and what a query sees of each."""
        for _ in range(steps):
            if self.storage is not None and begins_packing(self.other):
                self.stop()
            if self.storage is None and not begins_packing(self.other):
                self.storage = StaticStorage(self.other, far_capacity)
                self.storage.take_from(self.other)
            if self.storage is None:
                self.eager_steps += 1
            else:
                self.storage.settle()
                self.storage.advance()
            query = torch.randn(self.batch, 4, 1, SIZE, generator=self.generator)
            for layer, (k, v) in enumerate(self.tokens(1)):
                expected, got = (
                    turboquant_attention(MODULE, query, *cache.update(k, v, layer), None)[0]
                    for cache in (self.snapshot, self.other)
                )
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)

    def stop(self) -> None:
        if self.storage is not None:
            self.storage.give_back(self.other)
            self.storage = None


@pytest.mark.parametrize(
    ("name", "length"),
    [*((name, 131) for name in SETTINGS), *(("small", length) for length in (3, 34, 132)), ("balanced", 420)],
)
def test_the_same_tokens_and_codes(name: str, length: int, stored: Stored) -> None:
    """Seen at every step, and stored at the end."""
    pair = Pair(length, SETTINGS[name])
    pair.decode(100)
    assert pair.eager_steps <= 1
    assert pair.other.get_seq_length() == length + 100
    pair.stop()
    assert pair.other.get_seq_length() == length + 100
    for layer in range(LAYERS):
        for expected, got in zip(stored(pair.snapshot, layer), stored(pair.other, layer), strict=True):
            # Vectors of several layers are rotated at once, which may round otherwise: a code may lie on a boundary.
            assert (expected != got).float().mean() < 1e-4
            assert expected.shape == got.shape


def test_a_batch_and_several_turns(stored: Stored) -> None:
    """Turns go on from views of the buffers, cut, rewound and taken in again."""
    pair = Pair(300, SETTINGS["small"], batch=2)
    for cut in (0, 3, 50):
        pair.decode(37)
        pair.stop()
        for cache in (pair.snapshot, pair.other):
            cache.crop(-cut)
        pair.feed(41)
        pair.decode(20)
        pair.stop()
        pair.decode(1)
        pair.stop()
    for layer in range(LAYERS):
        for expected, got in zip(stored(pair.snapshot, layer), stored(pair.other, layer), strict=True):
            assert torch.equal(expected, got)


def test_tokens_stay_where_they_are_between_turns() -> None:
    pair = Pair(300, {})
    pair.decode(5)
    pair.stop()
    far = pair.other.layers[0]._k.far.codes.data_ptr()
    buffers = StaticStorage(pair.other, 512)
    buffers.take_from(pair.other)
    assert pair.other.layers[0]._k.far.codes.data_ptr() != far
    buffers.give_back(pair.other)
    far = pair.other.layers[0]._k.far.codes.data_ptr()
    buffers.take_from(pair.other)
    buffers.give_back(pair.other)
    assert pair.other.layers[0]._k.far.codes.data_ptr() == far


@pytest.mark.parametrize("length", [60, 500])
def test_bytes_in_both_forms(length: int) -> None:
    pair = Pair(length, {})
    uncompressed = 2 * LAYERS * HEADS * SIZE * 4
    for running in (True, False):
        pair.decode(10)
        if not running:
            pair.stop()
        report = pair.other.memory_report()
        assert pair.other.vram_bytes() == report.total == reachable_bytes(pair.other)
        assert report.uncompressed == uncompressed * pair.other.get_seq_length()
        # Room for 640 far tokens at 32 + 1 bytes, and for 288 near ones at 48 + 2, in every head of either side.
        assert report.codes + report.scales == 2 * LAYERS * HEADS * (640 * 33 + 288 * 50)


def test_a_dropped_token_leaves_no_trace(stored: Stored) -> None:
    pair = Pair(420, {})
    pair.decode(5)
    assert pair.storage is not None
    pair.storage.advance()
    for layer, (k, v) in enumerate(pair.tokens(1)):
        pair.other.update(k, v, layer)
    pair.storage.drop_last()
    pair.stop()
    assert torch.equal(stored(pair.snapshot, 1)[0], stored(pair.other, 1)[0])


def test_a_token_before_something_is_packed_waits() -> None:
    """Only then does the host have to know a token before the next step."""
    pair = Pair(420, {})
    waiting = []
    for step in range(64):
        pair.decode(1)
        assert pair.storage is not None
        if pair.storage.waits:
            waiting.append(step)
    assert [b - a for a, b in itertools.pairwise(waiting)] in ([1, 31, 1], [31, 1, 31])


def test_room_runs_out_before_the_buffers_do() -> None:
    pair = Pair(420, {})
    pair.decode(1, far_capacity=160)
    assert pair.storage is not None
    while pair.storage.fits(pair.storage.length + 1):
        pair.decode(1)
    assert pair.storage.waits
    assert pair.storage.length == 4 + 256 + 160 + 31


def test_only_single_tokens_are_taken_and_nothing_else_is_done() -> None:
    pair = Pair(420, {})
    pair.decode(1)
    layer = pair.other.layers[0]
    with pytest.raises(CacheError, match="give it back first"):
        layer.update(*torch.zeros(2, 1, HEADS, 2, SIZE))
    with pytest.raises(CacheError, match="give it back first"):
        layer.crop(-1)
    assert pair.storage is not None
    while pair.storage.length < 4 + 416 + 32:
        pair.storage.advance()
    with pytest.raises(CacheError, match="window of 32 tokens is full"):
        pair.storage.advance()


def test_anything_else_that_reads_a_handle_sees_the_tokens_in_use() -> None:
    pair = Pair(420, SETTINGS["identity"])
    pair.decode(7)
    assert pair.storage is not None
    pair.storage.settle()
    pair.storage.advance()
    k, v = pair.tokens(1)[0]
    expected, got = (cache.update(k, v, 0)[0] for cache in (pair.snapshot, pair.other))
    assert isinstance(got, KVHandle)
    assert got.shape == expected.shape
    assert torch.equal(got + 0, expected + 0)
    assert pair.other.get_mask_sizes(1, 0) == (got.shape[2], 0)


def test_the_window_before_and_after_packing_begins() -> None:
    assert window_length(Pair(60, {}).other) == 132
    assert window_length(Pair(132, {}).other) == 32


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("gemma3", {}, "layer 0 is not a compressed one (sliding window)"),
        ("falcon-h1", {}, "layer 0 is not a compressed one (HybridLayer has a recurrent state)"),
        ("llama", {"skip_first_layers": 1}, "layer 0 is not a compressed one (skip_first_layers or skip_last_layers)"),
        ("llama", {}, None),
    ],
)
def test_what_has_no_static_form(name: str, settings: dict[str, Any], reason: str | None) -> None:
    refusal = static_refusal(TurboQuantCache(tiny_model(name).config, **settings))
    assert refusal == reason
