"""Running a prompt into a cache: the part that is to be packed first, and in little memory.

A model runs a whole prompt layer by layer, and what a layer computes on the way (the MLP above all) takes several times
the memory of a compressed cache. Here each layer takes the prompt in pieces. A piece sees the exact keys and values of
those before it, as the layer's cache packs nothing until it has the last one: so the result is that of the whole.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, Final

import torch
from torch.utils._pytree import tree_leaves, tree_map

from turboquant_local.cache import TurboQuantCache, storage
from turboquant_local.cache.layer import CompressedLayer, settle
from turboquant_local.engine.decode_step import forward
from turboquant_local.engine.exchange import exchange_forward, exchanging
from turboquant_local.engine.prefill_fusion import fused

_PIECE: Final = 16_384
"""Tokens a layer takes at once on a GPU: nearly as fast as more, and small beside a prompt that needs it. For every
length of a piece, and of what lies before it, cuDNN makes a plan in each thread, which takes 40 ms."""

_TOGETHER: Final = 2048
"""So many tokens, at most, are packed for all layers at once, which until then hold them as they are. More would take
much memory; and the time it takes to launch the packing of every layer is hidden behind them."""

_FORGETFUL: Final = ("jamba", "recurrent_gemma", "zamba")
"""Recurrent models that begin with an empty state whenever they are given more than one token (transformers 5.23)."""

_PER_TOKEN: Final = ("position_ids", "position_embeddings")
"""What a layer is given for every token, beside the hidden states; the second dimension counts tokens."""


def rotation_limit(model: Any) -> float:
    """Length beyond which a model rotates all tokens of a sequence otherwise (longrope); infinite for most models."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict) and kind.get("rope_type") == "longrope"]
    return min((float(kind["original_max_position_embeddings"]) for kind in kinds), default=math.inf)


def continues(model: Any) -> bool:
    """Whether a prompt may be run in parts, and behind what a cache holds."""
    return model.config.get_text_config(decoder=True).model_type not in _FORGETFUL


def first_part(model: Any, cache: TurboQuantCache, length: int) -> int:
    """Tokens of a prompt of `length` to run alone: what will be far; none if the model must see it as a whole."""
    far = cache.window_start(length - 1)
    return 0 if far <= rotation_limit(model) < length or not continues(model) else far


def prefill(
    model: Any,
    cache: TurboQuantCache,
    ids: torch.Tensor,
    split: int,
    piece: int | None = None,
    settled: bool = True,
) -> torch.Tensor:
    """Run tokens into a cache; returns float32 scores `[1, vocab_size]` of the token behind them.

    Args:
        model: The model.
        cache: Its cache.
        ids: `[1, length]`.
        split: The first so many are run alone, and packed before the others are run.
        piece: Most tokens of the first part that a layer takes at once, where a model allows for it.
        settled: Pack what the last tokens push out of the window. If not, `cache.layer.settle` is to be called: the
            scores come sooner.
    """
    length = cache.get_seq_length() + ids.shape[1]
    piece = piece or (_PIECE if ids.is_cuda else ids.shape[1])  # elsewhere attention to pieces needs a mask
    with fused(model) if ids.is_cuda else nullcontext():
        for part in (ids[:, :split], ids[:, split:]):
            if part.shape[1] > min(_TOGETHER, piece):
                scores = _layer_by_layer(model, cache, part, length, piece)
            elif part.shape[1]:
                scores = _all_at_once(model, cache, part, length, settled)
    return scores


def _all_at_once(model: Any, cache: TurboQuantCache, ids: torch.Tensor, length: int, settled: bool) -> torch.Tensor:
    """Run tokens; pack, before and behind them, what `CompressedLayer.update` would pack in every layer by itself."""
    held = cache.get_seq_length()
    layers = [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]
    if held and not any(layer.is_packed for layer in layers):
        return forward(model, cache, ids)  # what is packed first may take its statistics from these tokens too
    settle(layers, held + ids.shape[1], among_first=held)
    for layer in layers:
        layer.packs = False
    scores = forward(model, cache, ids)
    for layer in layers:
        layer.packs = True
    if settled or cache.get_seq_length() < length:
        settle(layers, length, among_first=held + ids.shape[1])
    return scores


def _layer_by_layer(model: Any, cache: TurboQuantCache, ids: torch.Tensor, length: int, piece: int) -> torch.Tensor:
    """Run tokens, in pieces if the cache is empty and the model's layers are plain ones."""
    pieces = _Pieces(cache, list(pairwise((*range(0, ids.shape[1], piece), ids.shape[1]))), length)
    with ExitStack() as stack:
        with exchanging:  # all layers or none
            pairs = _pairs(model, cache) if cache.get_seq_length() == 0 else []
            for layer, store in pairs:
                exchange_forward(layer, pieces.of(layer.forward, store, last=store is pairs[-1][1]), stack)
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

    def __init__(self, cache: TurboQuantCache, bounds: list[tuple[int, int]], length: int) -> None:
        self._cache = cache
        self._bounds = bounds
        self._length = length
        self._rooms = storage.Room(bounds[-1][1]), storage.Room(bounds[-1][1])

    def of(self, original: Callable[..., torch.Tensor], store: CompressedLayer, last: bool) -> Callable[..., Any]:
        """A layer that takes pieces; the last one returns its last token alone, as nobody reads the others."""

        def run(hidden_states: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
            length = hidden_states.shape[1]
            per_token = tree_leaves([given.get(name) for name in _PER_TOKEN])
            fits = all(x is None or (x.dim() > 1 and x.shape[1] == length) for x in per_token)
            # The model may be shared: another thread's tokens are for another cache.
            ours = given.get("past_key_values") is self._cache
            if not ours or args or given.get("attention_mask") is not None or not fits:
                return original(hidden_states, *args, **given)
            store.packs, store.rooms = False, self._rooms
            for start, stop in self._bounds:
                cut = partial(_cut, part=slice(start, stop))
                some = given | {name: tree_map(cut, given[name]) for name in _PER_TOKEN if name in given}
                # Nobody reads what the layer before has made, or the embeddings, once more.
                hidden_states[:, start:stop] = original(cut(hidden_states), **some)
            store.packs, store.rooms = True, None
            store.settle(self._length, among_first=length)
            return hidden_states[:, -1:] if last else hidden_states

        return run


def _cut(x: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if x is None else x[:, part]
