"""The cache in a form whose shapes stay as they are while tokens are added: what a CUDA graph can replay.

Buffers have room to spare, and how much of them is in use stands in a tensor on the device. A step writes one token
into the window; packing goes on between steps, as in the snapshot form and with the same codes, for all layers at once.
"""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch

from turboquant_local.cache import storage
from turboquant_local.cache.buffers import SideBuffers
from turboquant_local.cache.cache import TurboQuantCache
from turboquant_local.cache.handle import KVHandle
from turboquant_local.cache.layer import CompressedLayer
from turboquant_local.cache.storage import SideCodec
from turboquant_local.errors import CacheError
from turboquant_local.kernels import api
from turboquant_local.kernels.layout import KVView

Sides = tuple[SideBuffers, SideBuffers]
"""Of keys and of values; layers with the same codecs share them."""


def static_refusal(cache: TurboQuantCache) -> str | None:
    """Why a cache cannot take the static form, or None."""
    if cache.kv_shape is None:
        return "its layers differ in heads or head size"
    for index, layer in enumerate(cache.layers):
        if type(layer) is not CompressedLayer:
            reason = cache.bypassed.get(str(index), f"{type(layer).__name__} has a recurrent state")
            return f"layer {index} is not a compressed one ({reason})"
    return None


class StaticStorage:
    """Buffers for all layers of a cache, filled from it and handed back to it.

    Attributes:
        far_capacity: Far tokens there is room for.
        window: Recent tokens there is room for.
    """

    def __init__(self, cache: TurboQuantCache, far_capacity: int) -> None:
        """Make room for the tokens of a cache that holds some; nothing is moved yet.

        Args:
            cache: All its layers are compressed, see `static_refusal`.
            far_capacity: As the attribute.
        """
        self._config = config = cache.kv_cache
        layers = _compressed(cache)
        first = layers[0]
        self.far_capacity, self.window = far_capacity, window_length(cache)
        self._lengths = torch.zeros(4, dtype=torch.int32, device=first.device)
        self._slot = torch.zeros(1, dtype=torch.long, device=first.device)
        self._in_use = (0, 0, 0, 0)
        self._layers: list[CompressedLayer] = []
        near_capacity = config.near_length + config.block_length
        capacities = (config.sink_length, far_capacity, near_capacity, self.window)
        assert first._k is not None
        assert first._v is not None
        alike: dict[tuple[SideCodec, SideCodec], list[int]] = {}
        for index, layer in enumerate(layers):
            alike.setdefault((layer._k_codec, layer._v_codec), []).append(index)
        self._sides: list[SideBuffers] = []
        self._places: dict[int, tuple[Sides, int]] = {}
        for (k_codec, v_codec), indices in alike.items():
            keys, values = (
                SideBuffers(like, codec, len(indices), capacities)
                for like, codec in ((first._k, k_codec), (first._v, v_codec))
            )
            self._sides += [keys, values]
            self._places |= {index: ((keys, values), place) for place, index in enumerate(indices)}

    @property
    def length(self) -> int:
        """Tokens held."""
        return sum(self._in_use)

    def fits(self, length: int) -> bool:
        """Whether so many tokens of a sequence have room."""
        return self._config.far_length(length) <= self.far_capacity

    def take_from(self, cache: TurboQuantCache) -> None:
        """Move the tokens of a cache here, layer by layer, and serve the cache's updates from now on."""
        self._layers = list(_compressed(cache))
        view = self._layers[0]._k
        assert view is not None
        packed = [0 if part is None else part.length for part in (view.far, view.near)]
        for index, layer in enumerate(self._layers):
            sides, place = self._places[index]
            for side, tokens in zip(sides, (layer._k, layer._v), strict=True):
                side.load(place, tokens)
            # Its memory is free before the next layer takes more.
            layer._k = layer._v = layer._reserve = layer._slot = None
            keys, values = self._views(index)
            cache.layers[index] = StaticLayer(layer, keys, values, self, self._slot)
        self._use(view.sinks.shape[2], *packed, view.recent.shape[2])

    def give_back(self, cache: TurboQuantCache) -> None:
        """Let the cache hold its tokens itself again: views of the buffers, packed as far as they would be there."""
        first = not self.is_packed  # then what is packed now gives the statistics of the heads
        if not first:
            self._settle(*storage.targets(self._config, self.length))
        for index, layer in enumerate(self._layers):
            sides, place = self._places[index]
            views = [side.used(place, self._in_use) for side in sides]
            if first:
                codecs = (layer._k_codec, layer._v_codec)
                views = [storage.settle([x], self._config, codec)[0] for x, codec in zip(views, codecs, strict=True)]
            layer._store(*views)
        cache.layers, self._layers = list(self._layers), []
        self.count_in(cache)

    def count_in(self, cache: TurboQuantCache) -> None:
        """Let a cache that these buffers are kept for count all of them as its own."""
        for index, layer in enumerate(_compressed(cache)):
            layer._reserve, layer._slot = self._views(index), self._slot

    def _views(self, index: int) -> tuple[KVView, KVView]:
        (keys, values), place = self._places[index]
        return keys.view(place, self._lengths), values.view(place, self._lengths)

    @property
    def is_packed(self) -> bool:
        """Whether any token is packed."""
        return self._in_use[1] + self._in_use[2] > 0

    @property
    def waits(self) -> bool:
        """Whether something is to be packed, or room to be made, before the next token."""
        return self._pending() != [] or not self.fits(self.length + 1)

    def settle(self) -> None:
        """Pack what the next token does not see unpacked any more."""
        for target in self._pending():
            self._settle(*target)

    def advance(self) -> None:
        """Make room for the next token, which the model's layers then write."""
        sinks, far, near, recent = self._in_use
        if recent == self.window:
            raise CacheError(f"a window of {recent} tokens is full: settle() before the next one")
        self._slot.fill_(recent)
        self._use(sinks, far, near, recent + 1)

    def drop_last(self) -> None:
        """Forget the last token, which `advance` made room for."""
        sinks, far, near, recent = self._in_use
        self._use(sinks, far, near, recent - 1)

    def _pending(self) -> list[tuple[int, int]]:
        """What a layer would pack at the end of the last update and at the start of the next."""
        _, far, near, _ = self._in_use
        pending = []
        for target in (
            storage.targets(self._config, self.length),
            storage.targets(self._config, self.length + 1, among_first=self.length),
        ):
            if target[0] > far + near or target[1] > far:
                pending.append(target)
                far, near = max(far, target[1]), max(far + near, target[0]) - max(far, target[1])
        return pending

    def _settle(self, target: int, far_target: int) -> None:
        sinks, far, near, recent = self._in_use
        count = max(0, target - far - near)
        if count:
            for side in self._sides:
                side.pack(count, near, recent)
            near, recent = near + count, recent - count
        leaving = max(0, min(near, far_target - far))
        if leaving:
            for side in self._sides:
                side.demote(leaving, far, near)
            far, near = far + leaving, near - leaving
        self._use(sinks, far, near, recent)

    def _use(self, *lengths: int) -> None:
        # Filling waits for nothing, where a copy from the host's memory would.
        for index, (old, new) in enumerate(zip(self._in_use, lengths, strict=True)):
            if new != old:
                self._lengths[index].fill_(new)
        self._in_use = lengths  # type: ignore[assignment]


def begins_packing(cache: TurboQuantCache) -> bool:
    """Whether something is to be packed for the first time, now or by the next token: only the snapshot form can."""
    length = cache.get_seq_length()
    targets = storage.targets(cache.kv_cache, length), storage.targets(cache.kv_cache, length + 1, length)
    return not _compressed(cache)[0].is_packed and max(targets) > (0, 0)


def forget_buffers(cache: TurboQuantCache) -> None:
    """Let a cache count only what it has tokens in: the rest of the buffers is freed with their `StaticStorage`."""
    for layer in cache.layers:
        if isinstance(layer, CompressedLayer):
            layer._reserve = layer._slot = None


def window_length(cache: TurboQuantCache) -> int:
    """Most tokens that a step sees unpacked behind the sinks."""
    config = cache.kv_cache
    whole = config.sink_length + max(config.sample_length, config.residual_length)  # then the first are packed
    return whole if cache.get_seq_length() < whole else max(config.residual_length, config.block_length)


def _compressed(cache: TurboQuantCache) -> list[CompressedLayer]:
    return cast(list[CompressedLayer], cache.layers)


class StaticLayer(CompressedLayer):
    """A compressed layer that writes each new token into a buffer; only `StaticStorage` makes and changes it."""

    def __init__(
        self, layer: CompressedLayer, keys: KVView, values: KVView, tokens: StaticStorage, slot: torch.Tensor
    ) -> None:
        """Stand in for a layer.

        Args:
            layer: The layer.
            keys: Its buffers.
            values: Likewise.
            tokens: What knows how many tokens there are.
            slot: int64 `[1]` on the device, where in the window the next token goes.
        """
        super().__init__(layer.kv_cache, layer.stats, layer.shape)
        self.dtype, self.device = layer.dtype, layer.device
        CompressedLayer._store(self, keys, values)
        self._tokens, self._slot = tokens, slot
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token, for which `StaticStorage.advance` has made room."""
        assert self._k is not None
        assert self._v is not None
        assert self._slot is not None
        if key_states.shape[2] != 1:
            raise CacheError(f"{key_states.shape[2]} tokens at once: the static form takes one; give it back first")
        api.write_token(self._k.recent, self._v.recent, self._slot, key_states, value_states)
        return self._as_tensor(self._k), self._as_tensor(self._v)

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._tokens.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask: the token that comes is counted already."""
        return self._tokens.length, 0

    @property
    def is_packed(self) -> bool:
        """Whether any token is packed."""
        return self._tokens.is_packed

    def _as_tensor(self, view: KVView) -> torch.Tensor:
        return KVHandle(view, self.stats, self._tokens.length)

    def _store(self, k: KVView, v: KVView) -> NoReturn:
        raise CacheError("this cache is decoding in its static form, which can only grow; give it back first")
