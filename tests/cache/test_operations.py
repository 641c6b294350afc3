"""Any sequence of operations: with the identity codec as in transformers, with fewer bits on the codes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad
from transformers import DynamicCache

from turboquant_local.cache import KVHandle, TurboQuantCache
from turboquant_local.testing import random_kv, tiny_model

LENGTHS = {"sink_length": 2, "residual_length": 8, "near_length": 16}
CONFIG = tiny_model("llama", num_hidden_layers=2).config
HEADS, HEAD_DIM = CONFIG.num_key_value_heads, CONFIG.head_dim

PROPERTY = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def states(batch_size: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return random_kv(CONFIG, batch_size, length, seed=seed)


def tensors(cache: DynamicCache, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as plain tensors."""
    keys, values = cache.layers[layer].keys, cache.layers[layer].values
    return tuple(x.dequantize() if isinstance(x, KVHandle) else x for x in (keys, values))


# An operation is its name and a number, whose meaning follows from the state of the cache when it is applied.
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["update", "update", "update", "crop", "reorder", "repeat", "select", "offload", "fork", "reset"]
        ),
        st.integers(min_value=0, max_value=10_000),
    ),
    min_size=1,
    max_size=14,
)


def batch_indices(batch_size: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, batch_size, (batch_size,), generator=generator)


@PROPERTY
@given(operations=OPERATIONS, lengths=st.sampled_from([(2, 8, 8), (0, 1, 3), (0, 0, 0), (3, 40, 32), (5, 13, 0)]))
def test_identity_codec_follows_the_stock_cache(
    operations: list[tuple[str, int]], lengths: tuple[int, int, int]
) -> None:
    sink_length, residual_length, near_length = lengths
    fields = {"sink_length": sink_length, "residual_length": residual_length, "near_length": near_length}
    ours = TurboQuantCache(CONFIG, "identity", **fields)
    stock, batch_size = DynamicCache(config=CONFIG), 2
    for name, number in operations:
        length = stock.get_seq_length()
        if name == "update":
            for layer in range(2):
                new = states(batch_size, 1 + number % 23, seed=number + layer)
                expected = stock.update(*new, layer)
                for mine, theirs in zip(ours.update(*new, layer), expected, strict=True):
                    assert mine.shape == theirs.shape
                    assert torch.equal(mine + 0, theirs)
        elif name == "reset":
            ours.reset()
            stock = DynamicCache(config=CONFIG)  # Before 5.23 a reset stock cache keeps its length.
        elif length:
            for cache in (ours, stock):
                if name == "crop":
                    cache.crop(-(number % (length + 1)))
                elif name == "reorder":
                    cache.reorder_cache(batch_indices(batch_size, number))
                elif name == "repeat" and batch_size <= 4:
                    cache.batch_repeat_interleave(2)
                elif name == "select":
                    cache.batch_select_indices(batch_indices(batch_size, number)[: 1 + number % batch_size])
                elif name == "offload":
                    for layer in cache.layers:
                        layer.offload()
                        layer.prefetch()
            if name == "fork":
                ours, left_behind = copy.deepcopy(ours), ours
                left_behind.reset()
        if stock.get_seq_length():
            batch_size = stock.layers[0].keys.shape[0]
        assert ours.get_seq_length() == stock.get_seq_length()
        for layer in range(2):
            assert ours.get_mask_sizes(7, layer) == stock.get_mask_sizes(7, layer)
            if stock.get_seq_length():
                for mine, theirs in zip(tensors(ours, layer), tensors(stock, layer), strict=True):
                    assert torch.equal(mine, theirs)


@PROPERTY
@given(operations=OPERATIONS, bits=st.sampled_from([(4, 4), (3, 2), (1, 8), (16, 4)]), center=st.booleans())
def test_tokens_are_packed_once_near_and_once_far(
    operations: list[tuple[str, int]],
    bits: tuple[int, int],
    center: bool,
    stored: Callable[[TurboQuantCache, int], list[torch.Tensor]],
) -> None:
    """What is stored of a token stays the same, to the bit, for as long as it stays where it is."""
    cache = TurboQuantCache(CONFIG, k_bits=bits[0], v_bits=bits[1], center_keys=center, **LENGTHS)
    batch_size = 2
    # Per side: what was fed, and what the cache last held of it.
    fed = held = [torch.empty(batch_size, HEADS, 0, HEAD_DIM + 1)] * 2
    far = packed = 0  # tokens up to which the cache was last far, and packed

    for name, number in operations:
        length = fed[0].shape[2]
        change: Callable[[torch.Tensor], torch.Tensor] | None = None
        if name == "update":
            new = states(batch_size, 1 + number % 23, seed=number)
            cache.update(*new, 0)
            new = [pad(x, (0, 1), value=1.0) for x in new]
            fed = [torch.cat([x, y], dim=2) for x, y in zip(fed, new, strict=True)]
            held = [torch.cat([x, y], dim=2) for x, y in zip(held, new, strict=True)]
        elif not length:
            continue
        elif name == "crop":
            kept = length - number % length
            cache.layers[0].crop(kept - length)
            change = lambda x: x[:, :, :kept]  # noqa: B023, E731
        elif name == "reorder":
            cache.reorder_cache(batch_indices(batch_size, number))
            change = lambda x: x[batch_indices(batch_size, number)]  # noqa: B023, E731
        elif name == "repeat" and batch_size <= 4:
            cache.batch_repeat_interleave(2)
            change = lambda x: x.repeat_interleave(2, dim=0)  # noqa: E731
        elif name == "select":
            cache.batch_select_indices(torch.tensor([number % batch_size]))
            change = lambda x: x[[number % batch_size]]  # noqa: B023, E731
        elif name == "fork":
            cache = copy.deepcopy(cache)
        if change is not None:
            fed, held = [change(x) for x in fed], [change(x) for x in held]
        batch_size, length = fed[0].shape[0], fed[0].shape[2]
        now, view = stored(cache, 0), cache.layers[0]._k
        was_far, was_packed = min(far, length), min(packed, length)
        far = view.sinks.shape[2] + (view.far.length if view.far else 0)
        packed = view.sinks.shape[2] + view.packed_length
        for raw, before, after, side_bits in zip(fed, held, now, bits, strict=True):
            assert torch.equal(after[:, :, :was_far], before[:, :, :was_far])
            assert torch.equal(after[:, :, far:was_packed], before[:, :, far:was_packed])
            exact = (after == raw).all(dim=-1)
            assert exact[:, :, packed:].all()
            assert exact[:, :, : view.sinks.shape[2]].all()
            assert side_bits != 16 or exact.all()
        assert cache.layers[0]._v.packed_length == view.packed_length >= cache.kv_cache.packed_length(length)
        held = list(now)
