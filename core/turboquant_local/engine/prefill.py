"""Running a prompt into a cache: the part that is to be packed first, and in little memory.

A model runs a whole prompt layer by layer, and what a layer computes on the way (the MLP above all) takes several times
the memory of a compressed cache. Here each layer takes the prompt in pieces. A piece sees the exact keys and values of
those before it, as the layer's cache packs nothing until it has the last one: so the result is that of the whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any, Final

import torch
from torch.utils._pytree import tree_leaves, tree_map

from turboquant_local.cache import TurboQuantCache
from turboquant_local.cache.layer import CompressedLayer
from turboquant_local.engine.decode_step import forward

_PIECE: Final = 8192
"""Tokens a layer takes at once on a GPU: as fast as more, and small beside a prompt that needs it."""

_PER_TOKEN: Final = ("position_ids", "position_embeddings")
"""What a layer is given for every token, beside the hidden states; the second dimension counts tokens."""


def prefill(
    model: Any, cache: TurboQuantCache, ids: torch.Tensor, split: int, piece: int | None = None
) -> torch.Tensor:
    """Run tokens into a cache; returns float32 scores `[1, vocab_size]` of the token behind them.

    Args:
        model: The model.
        cache: Its cache.
        ids: `[1, length]`.
        split: The first so many are run alone, and packed before the others are run.
        piece: Most tokens of the first part that a layer takes at once, where a model allows for it.
    """
    piece = piece or (_PIECE if ids.is_cuda else ids.shape[1])  # elsewhere attention to pieces needs a mask
    pairs = _pairs(model, cache) if split and cache.get_seq_length() == 0 else []
    if not pairs:
        if 0 < split < ids.shape[1]:
            forward(model, cache, ids[:, :split])
            ids = ids[:, split:]
        return forward(model, cache, ids)
    pieces = _Pieces(sorted({*range(0, split, piece), split, ids.shape[1]}), split)
    with ExitStack() as stack:
        for layer, store in pairs:
            layer.forward = pieces.of(layer.forward, store, last=store is pairs[-1][1])
            stack.callback(delattr, layer, "forward")
        return forward(model, cache, ids)


def _pairs(model: Any, cache: TurboQuantCache) -> list[tuple[torch.nn.Module, CompressedLayer]]:
    """The model's layers with their caches; none if a layer may be more than attention and work on tokens."""
    layers = list(getattr(model.base_model, "layers", []))
    stores = [store for store in cache.layers if type(store) is CompressedLayer]
    alike = len(layers) == len(cache.layers) == len(stores) and all(map(_is_plain, layers))
    return list(zip(layers, stores, strict=True)) if alike else []


def _is_plain(layer: torch.nn.Module) -> bool:
    """Whether a layer takes and returns hidden states alone, and nobody else's hook is in its place."""
    signature = inspect.signature(layer.forward)
    known = {"hidden_states", "attention_mask", "past_key_values", "use_cache", *_PER_TOKEN}
    names = {name for name, parameter in signature.parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    returns = signature.return_annotation in (torch.Tensor, "torch.Tensor")
    return "forward" not in vars(layer) and "hidden_states" in names <= known and returns


class _Pieces:
    """What the layers of a model become while a prompt goes through them."""

    def __init__(self, bounds: list[int], split: int) -> None:
        self._bounds = list(pairwise(bounds))
        self._split = split
        self._hidden: torch.Tensor | None = None  # made here: the next layer may write over it

    def of(self, original: Callable[..., torch.Tensor], store: CompressedLayer, last: bool) -> Callable[..., Any]:
        """A layer that takes pieces; the last one returns its last token alone, as nobody reads the others."""

        def run(hidden_states: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
            length = hidden_states.shape[1]
            per_token = tree_leaves([given.get(name) for name in _PER_TOKEN])
            fits = all(x is None or (x.dim() > 1 and x.shape[1] == length) for x in per_token)
            if args or given.get("attention_mask") is not None or not fits:
                return original(hidden_states, *args, **given)
            if self._hidden is None:
                self._hidden = torch.empty_like(hidden_states)
            for start, stop in self._bounds:
                cut = partial(_cut, part=slice(start, stop))
                some = given | {name: tree_map(cut, given[name]) for name in _PER_TOKEN if name in given}
                store.packs = stop > self._split
                self._hidden[:, start:stop] = original(cut(hidden_states), **some)
                if stop == self._split:
                    store.packs = True
                    store.settle()
            return self._hidden[:, -1:] if last else self._hidden

        return run


def _cut(x: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if x is None else x[:, part]
