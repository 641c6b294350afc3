"""`TurboQuantCache`: a transformers cache whose full-attention layers are compressed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from turboquant_local.cache.accounting import MemoryReport, live_tensors, report, storage_bytes
from turboquant_local.cache.auto import COMPRESSIBLE, choose, is_mla, kv_shape
from turboquant_local.cache.handle import AttentionStats
from turboquant_local.cache.layer import CompressedLayer, HybridLayer, PlainLayer
from turboquant_local.cache.storage import make_codec
from turboquant_local.config import TurboQuantConfig
from turboquant_local.errors import CacheError, ConfigError

SKIPPED = "skip_first_layers or skip_last_layers"
"""Reason of a layer that the settings themselves leave uncompressed."""

ATTENTION_NAME = "turboquant"
"""Name under which the packed attention is registered with transformers."""


class TurboQuantCache(DynamicCache):
    """A drop-in for `DynamicCache` that keeps old tokens packed and attends to them as they are.

    ```python
    cache = TurboQuantCache(model.config, k_bits=4, v_bits=4)
    model.generate(**inputs, past_key_values=cache)
    print(cache.vram_bytes(), cache.compression_ratio())
    ```

    Full-attention layers are compressed. Sliding-window, linear-attention and MLA layers stay transformers' own,
    and `bypassed` names them. The attention implementation of the given config is set to "turboquant", which
    reads packed tokens and passes everything else on to transformers' own attention.

    Attributes:
        kv_cache: The settings; with "auto", those that were chosen.
        explanation: Why "auto" chose them, in plain sentences; "" if a preset was named.
        bypassed: Layers that stay uncompressed, by index, with the reason.
        stats: Which attention ran, and how often something was decompressed as a whole.
        kv_shape: `(num_kv_heads, head_dim)` of the model, or None where its layers differ.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        kv_cache: TurboQuantConfig | Mapping[str, Any] | str | None = None,
        *,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        set_attention: bool = True,
        **fields: Any,
    ) -> None:
        """Build an empty cache for one model.

        Args:
            config: `model.config`.
            kv_cache: A `TurboQuantConfig`, a dict of its fields or a preset's name; "balanced" if None. "auto"
                chooses a preset for this model.
            offloading: Keep all layers but the one at work on the CPU, as in `DynamicCache`.
            offload_only_non_sliding: As in `DynamicCache`.
            set_attention: Set the config's attention implementation, where the model's code asks for one. If not,
                other attention still gives the right result, but decompresses every layer at every step.
            **fields: Fields of `TurboQuantConfig`, such as `k_bits=4`.

        Raises:
            ConfigError: A setting that does not exist or does not fit the model.
            CacheError: `config` is not a model's config.
        """
        if not isinstance(config, PreTrainedConfig):
            raise CacheError(f"config={type(config).__name__}: expected a model's config; pass model.config")
        choice = choose(TurboQuantConfig.parse(kv_cache, **fields), config)
        self.kv_cache, self.explanation = choice.kv_cache, choice.explanation
        self.stats = AttentionStats()
        self._decoder_config = config.get_text_config(decoder=True)
        self.kv_shape = kv_shape(self._decoder_config)
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        self.layers, self.bypassed = self._compress(self.layers)
        if set_attention and any(isinstance(layer, CompressedLayer) for layer in self.layers):
            # An encoder-decoder's decoder config is a copy; its attention reads the whole config.
            target = config if getattr(config, "is_encoder_decoder", False) else self._decoder_config
            if not _has_attention_of_its_own(target):
                target._attn_implementation = ATTENTION_NAME

    def _compress(self, layers: list[Any]) -> tuple[list[Any], dict[str, str]]:
        """Put our layers in the places of transformers' full-attention layers."""
        candidates = [i for i, layer in enumerate(layers) if type(layer) in COMPRESSIBLE]
        skipped = set(candidates[: self.kv_cache.skip_first_layers])
        if self.kv_cache.skip_last_layers:
            skipped |= set(candidates[-self.kv_cache.skip_last_layers :])
        everywhere = self._incompressible()
        bypassed: dict[str, str] = {}
        compressed: list[Any] = []
        for index, layer in enumerate(layers):
            reason = None
            if index not in candidates:
                reason = _reason(layer)
            elif everywhere is not None:
                reason = everywhere
            elif index in skipped:
                reason = SKIPPED
            if reason is None:
                own = self.kv_cache.of_layer(index)
                if type(layer) is DynamicLayer:
                    layer = CompressedLayer(own, self.stats, self.kv_shape)
                else:
                    layer = HybridLayer(own, self.stats, self.kv_shape, layer.number_of_states)
            else:
                bypassed[str(index)] = reason
                if type(layer) is DynamicLayer:
                    layer = PlainLayer()  # type: ignore[no-untyped-call]
            compressed.append(layer)
        for index, *_ in self.kv_cache.layer_bits:
            if index >= len(compressed) or str(index) in bypassed:
                reason = bypassed.get(str(index), f"it has {len(compressed)} layers")
                raise ConfigError(f"layer_bits: layer {index} of this model is not compressed ({reason}); leave it out")
        return compressed, bypassed

    def _incompressible(self) -> str | None:
        """Why no layer of this model can be compressed; None if they can."""
        if is_mla(self._decoder_config):
            return "MLA: keys and values come from a latent that is smaller still"
        if self.kv_shape is None:
            return None
        head_dim = self.kv_shape[1]
        # "auto" has gone to 16 bits for that very reason.
        if head_dim % 8 and (self.explanation or min(self.kv_cache.k_bits, self.kv_cache.v_bits) < 16):
            return f"head size {head_dim} is no multiple of 8"
        for bits in (self.kv_cache.k_bits, self.kv_cache.v_bits):
            make_codec(self.kv_cache, head_dim, bits, keys=True)
        return None

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `DynamicCache`; a layer that packs returns handles in place of tensors.

        Raises:
            CacheError: The model has more layers, other heads or another head size than the cache's config.
        """
        if layer_idx >= len(self.layers):
            raise CacheError(
                f"layer_idx={layer_idx}: this cache was built for a model of {len(self.layers)} layers; "
                "build it from this model's config: TurboQuantCache(model.config)"
            )
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def reset(self) -> None:
        """Forget all tokens. Layers are built anew: in transformers 5.17 a stock layer's own reset keeps its length."""
        recording = any(getattr(layer, "record_past", False) for layer in self.layers)
        fresh = DynamicCache(config=self._decoder_config)
        self.layers, self.bypassed = self._compress(fresh.layers)
        if recording:
            self.activate_past_recording()  # type: ignore[no-untyped-call]

    def window_start(self, length: int) -> int:
        """Where sinks and far tokens end once the cache holds `length` tokens; near and recent ones come after them.

        0 while nothing would be far.
        """
        far = self.kv_cache.far_length(length)
        return self.kv_cache.sink_length + far if far else 0

    def rewind(self, length: int) -> int:
        """Go back to at most `length` tokens, to a point from which generation goes on as in a fresh cache.

        A plain `crop` may leave far tokens where a fresh cache would have near or recent ones. This drops those
        too; the caller feeds these few tokens again. A model whose layers cannot go back (a sliding window
        that has moved on, recurrent states) is reset.

        Args:
            length: Tokens that still hold.

        Returns:
            Tokens kept.
        """
        have = self.get_seq_length()
        if length >= have:
            return have
        kept = self.window_start(length)
        if kept and all(_can_go_back(layer) for layer in self.layers):
            self.crop(kept - have)
            return kept
        self.reset()
        return 0

    def vram_bytes(self) -> int:
        """Bytes of all tensors the cache keeps alive, wherever they lie."""
        return storage_bytes(live_tensors([dict(vars(layer)) for layer in self.layers]))

    def uncompressed_bytes(self) -> int:
        """Bytes that `DynamicCache` would hold for the same tokens."""
        return self.memory_report().uncompressed

    def compression_ratio(self) -> float:
        """`uncompressed_bytes() / vram_bytes()`; 1.0 while empty."""
        return self.memory_report().compression_ratio

    def memory_report(self) -> MemoryReport:
        """The bytes part by part: codes, scales, statistics, sinks, recent, bypassed, constants."""
        return report(self.layers)


def _has_attention_of_its_own(config: PreTrainedConfig) -> bool:
    """Whether the loaded model of a config never asks transformers for an attention function (GPT-J, Bloom, Falcon).

    It does ask for the mask that the config's implementation needs, and our attention needs none in places.
    """
    prefix = type(config).__module__.rpartition(".")[0] + ".modeling_"
    files = [
        dict(vars(file)) for name, file in list(sys.modules.items()) if name.startswith(prefix) and file is not None
    ]
    written = any(
        "Attention" in name and file["__name__"] == value.__module__
        for file in files
        for name, value in file.items()
        if isinstance(value, type)
    )
    return written and not any("ALL_ATTENTION_FUNCTIONS" in file for file in files)


def _reason(layer: object) -> str:
    if isinstance(layer, DynamicSlidingWindowLayer):
        return "sliding window"
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return "linear attention"
    return f"{type(layer).__name__} of transformers"


def _can_go_back(layer: Any) -> bool:
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return False
    return not isinstance(layer, DynamicSlidingWindowLayer) or layer.get_seq_length() < layer.sliding_window
