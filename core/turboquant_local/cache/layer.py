"""The layers of the cache, as peers with the same methods in the same order: compressed, plain, hybrid."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from turboquant_local.cache import storage
from turboquant_local.cache.handle import AttentionStats, KVHandle
from turboquant_local.config import TurboQuantConfig
from turboquant_local.errors import CacheError
from turboquant_local.kernels.layout import KVView


def _refuse(value: torch.Tensor | None) -> None:
    if value is not None:
        raise CacheError("keys and values of a compressed layer cannot be assigned; use update()")


class CompressedLayer(DynamicLayer):
    """Sinks and a recent window in the model's dtype, the tokens between them packed.

    Attributes:
        kv_cache: The settings.
        stats: Shared by all layers of a cache.
        packs: Pack tokens as they leave the recent window. If not, they are kept until `settle`.
        rooms: Where keys and values of an empty layer are kept until then, if it is given more than once.
    """

    def __init__(self, kv_cache: TurboQuantConfig, stats: AttentionStats, shape: tuple[int, int] | None = None) -> None:
        """Store the settings.

        Args:
            kv_cache: The settings.
            stats: Where attention calls are counted.
            shape: `(num_kv_heads, head_dim)` of the model it is built for, if known.
        """
        self.kv_cache = kv_cache
        self.stats = stats
        self.shape = shape
        self.packs = True
        self.rooms: tuple[storage.Room, storage.Room] | None = None
        self._k: KVView | None = None
        self._v: KVView | None = None
        self._constants: tuple[torch.Tensor, ...] = ()
        # Buffers kept for decoding, and where in the window the next token goes: held here to be counted.
        self._reserve: tuple[KVView, KVView] | None = None
        self._slot: torch.Tensor | None = None
        self.is_initialized = False

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys: a handle once something is packed, else the plain tensor."""
        return None if self._k is None else self._as_tensor(self._k)

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        _refuse(value)
        self._k = None

    @property
    def values(self) -> torch.Tensor | None:
        """All values, likewise."""
        return None if self._v is None else self._as_tensor(self._v)

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        _refuse(value)
        self._v = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take dtype, device and shapes from the first keys and values."""
        shape = (key_states.shape[1], key_states.shape[3])
        if self.shape is not None and shape != self.shape and not torch.distributed.is_initialized():
            raise CacheError(
                f"keys with (heads, head_dim) = {shape}: this cache was built for a model with {self.shape}; "
                "build it from this model's config: TurboQuantCache(model.config)"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        config, packing = self.kv_cache, self.stats.packing
        self._k_codec = replace(
            storage.make_codec(config, key_states.shape[3], config.k_bits, keys=True), packing=packing
        )
        self._v_codec = replace(
            storage.make_codec(config, value_states.shape[3], config.v_bits, keys=False), packing=packing
        )
        self._store(storage.empty(key_states), storage.empty(value_states))
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens, and return all keys and values as attention is to see them.

        The new tokens are seen exactly. Older ones that this update pushes out of the recent window are packed
        first: attention sees the same whether they were packed just now, or earlier and kept by `rewind`. While
        nothing is packed, plain tensors are returned and the model's own attention runs on them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._k is not None
        assert self._v is not None
        if key_states.shape[0] != self._k.shape[0]:
            raise CacheError(
                f"batch of {key_states.shape[0]}: the cache holds {self._k.shape[0]}; "
                "reset() it, or use batch_repeat_interleave / batch_select_indices"
            )
        config, held = self.kv_cache, self._k.shape[2]
        room_k, room_v = self.rooms or (None, None)
        seen_k, seen_v = storage.append(self._k, key_states, room_k), storage.append(self._v, value_states, room_v)
        if held and self.packs:
            (seen_k,) = storage.settle([seen_k], config, self._k_codec, among_first=held)
            (seen_v,) = storage.settle([seen_v], config, self._v_codec, among_first=held)
        self._store(seen_k, seen_v)
        if self.packs:
            self.settle()
        if not seen_k.packed:
            self.stats.attention["exact"] += 1
        return self._as_tensor(seen_k), self._as_tensor(seen_v)

    def settle(self, length: int | None = None, among_first: int | None = None) -> None:
        """Pack what has left the recent window; arguments as for `storage.settle`."""
        settle([self], length, among_first)

    def get_seq_length(self) -> int:
        """Tokens held."""
        return 0 if self._k is None else self._k.shape[2]

    @property
    def is_packed(self) -> bool:
        """Whether any token is packed."""
        return self._k is not None and bool(self._k.packed)

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back."""
        if self.is_initialized:
            if self.device.type == "cuda":
                # What is moved may still be on its way out, and the memory it goes to may still be read. Before 5.23
                # transformers does not wait for either.
                torch.cuda.current_stream(self.device).wait_stream(torch.cuda.default_stream(self.device))
            self._map(lambda x: x.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forget all tokens."""
        self._k = self._v = self._reserve = self._slot = None
        self._constants = ()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch for beam search."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; packed ones are cut, not quantised again.

        Args:
            tokens_to_remove: Negative number of tokens; 0 does nothing.

        Raises:
            ValueError: A positive number, as in transformers.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: expected a negative number, the tokens to drop from the end"
            )
        if tokens_to_remove == 0 or self._k is None or self._v is None:
            return
        length = max(0, self.get_seq_length() + tokens_to_remove)
        self._store(storage.crop(self._k, length), storage.crop(self._v, length))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences of the batch."""
        self._map(lambda x: x[indices])

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._k is not None and self._v is not None:
            self._store(storage.map_tensors(self._k, function), storage.map_tensors(self._v, function))

    def _store(self, k: KVView, v: KVView) -> None:
        self._k, self._v = k, v
        # Rotations and codebooks are shared, but alive as long as something packed needs them: held to be counted.
        used = {part.quantizer for part in (*k.packed, *v.packed)}
        self._constants = tuple(x for quantizer in used for x in quantizer.constants(self.device))

    def _as_tensor(self, view: KVView) -> torch.Tensor:
        return KVHandle(view, self.stats) if view.packed else view.recent


def settle(layers: Iterable[object], length: int | None = None, among_first: int | None = None) -> None:
    """Pack what has left the recent window of several layers, at once where they have the same codec.

    Args:
        layers: The compressed ones of them hold as many tokens each.
        length: As for `storage.settle`.
        among_first: Likewise.
    """
    alike: dict[object, list[CompressedLayer]] = {}
    for layer in layers:
        if isinstance(layer, CompressedLayer) and layer._k is not None:
            alike.setdefault((layer._k_codec, layer._v_codec, layer.device), []).append(layer)
    for group in alike.values():
        first = group[0]
        sides = [
            storage.settle([view for view in views if view is not None], first.kv_cache, codec, length, among_first)
            for views, codec in (
                ([layer._k for layer in group], first._k_codec),
                ([layer._v for layer in group], first._v_codec),
            )
        ]
        for layer, k, v in zip(group, *sides, strict=True):
            layer._store(k, v)


class PlainLayer(DynamicLayer):
    """A layer left in the model's dtype on purpose: transformers' own, but for owning what it keeps."""

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, and their memory."""
        super().crop(tokens_to_remove)
        if self.keys is not None and self.values is not None and tokens_to_remove:
            self.keys, self.values = self.keys.clone(), self.values.clone()


class HybridLayer(CompressedLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc,override]
    """A layer with both a recurrent state, kept as it is, and attention, compressed (Falcon-H1, Zamba2)."""

    def __init__(
        self,
        kv_cache: TurboQuantConfig,
        stats: AttentionStats,
        shape: tuple[int, int] | None = None,
        number_of_states: int = 1,
    ) -> None:
        """Store the settings; `number_of_states` as in transformers."""
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        CompressedLayer.__init__(self, kv_cache, stats, shape)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Positional keys and values start the attention side, keywords the recurrent one, as in transformers."""
        if args:
            CompressedLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def offload(self) -> None:
        """Move everything to the CPU."""
        CompressedLayer.offload(self)
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        """Move everything back."""
        CompressedLayer.prefetch(self)
        LinearAttentionLayer.prefetch(self)

    def reset(self) -> None:
        """Forget all tokens and states."""
        CompressedLayer.reset(self)
        LinearAttentionLayer.reset(self)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch for beam search."""
        CompressedLayer.reorder_cache(self, beam_idx)
        LinearAttentionLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; raises where the recurrent state cannot go back, as in transformers."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        CompressedLayer.crop(self, tokens_to_remove)
