"""The cache of the other codecs: quantised and read back at once, kept in the model's dtype.

For measuring only: nothing is packed and no memory is saved. The bytes are those of what the codec would store. Sinks
and a recent window are kept for all of them alike, so that codecs are compared and not their windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from turboquant_local.cache import TurboQuantCache, predict_bytes
from turboquant_local.config import BLOCK_LENGTH, TurboQuantConfig
from turboquant_local.errors import EvaluationError

SINK_LENGTH: Final = TurboQuantConfig().sink_length

RESIDUAL_LENGTH: Final = 128
"""The field's usual recent window. It costs more bytes than the near tokens of `TurboQuantCache`."""

_FEWEST_RECENT: Final = RESIDUAL_LENGTH - BLOCK_LENGTH


class FakeQuantizer(Protocol):
    """Quantises keys or values and gives back what would be read."""

    @property
    def block_length(self) -> int:
        """Tokens that are quantised together."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors after a round trip.

        Args:
            x: `[batch, num_kv_heads, tokens, head_dim]` float32; tokens is a multiple of `block_length`.
        """

    def bits_per_coordinate(self, head_dim: int) -> float:
        """Bits stored for a coordinate: its code and its share of scales, means and zero points."""

    def constant_bytes(self, head_dim: int) -> int:
        """Bytes that a cache holds once, whatever its length, such as a rotation."""


@dataclass(frozen=True)
class FakeQuantizedCodec:
    """A codec for keys and one for values behind sinks and a recent window.

    Attributes:
        name: Its name in tables.
        keys: Codec of the keys.
        values: Codec of the values.
        sink_length: First tokens that stay uncompressed.
        fewest_recent: Recent tokens that stay uncompressed at least; up to a block more wait until it is full.
    """

    name: str
    keys: FakeQuantizer
    values: FakeQuantizer
    sink_length: int = SINK_LENGTH
    fewest_recent: int = _FEWEST_RECENT

    @property
    def block_length(self) -> int:
        """Tokens that leave the window together."""
        return max(self.keys.block_length, self.values.block_length)

    def cache(self, model_config: PreTrainedConfig) -> DynamicCache:
        """A fresh, empty cache for a model; sliding and recurrent layers stay transformers' own."""
        cache = DynamicCache(config=model_config)
        cache.layers = [FakeQuantizedLayer(self) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    def packed_length(self, length: int) -> int:
        """Tokens that are stored compressed once a sequence has `length` tokens."""
        return max(0, length - self.sink_length - self.fewest_recent) // self.block_length * self.block_length

    def seen(self, length: int) -> int:
        """Tokens that the newest of `length` tokens sees compressed; it sees itself as it is."""
        blocks = max(0, length - 1 - self.sink_length) // self.block_length
        return min(self.packed_length(length), blocks * self.block_length)

    def stored_bytes(self, model_config: PreTrainedConfig, tokens: int) -> int:
        """Bytes of one sequence of `tokens` tokens of a 16-bit model.

        Raises:
            EvaluationError: The model has layers of several shapes.
        """
        shape = TurboQuantCache(model_config, "uncompressed", set_attention=False).kv_shape
        if shape is None:
            raise EvaluationError(f"codec={self.name!r}: the model's layers differ in shape, so its bytes are unknown")
        heads, head_dim = shape
        layers = sum(isinstance(layer, FakeQuantizedLayer) for layer in self.cache(model_config).layers)
        saved = sum(16 - side.bits_per_coordinate(head_dim) for side in (self.keys, self.values))
        coordinates = layers * heads * head_dim * self.packed_length(tokens)
        # Keys and values share what is constant.
        constants = max(side.constant_bytes(head_dim) for side in (self.keys, self.values)) if coordinates else 0
        return round(predict_bytes(model_config, "uncompressed", tokens) - coordinates * saved / 8) + constants


class FakeQuantizedLayer(DynamicLayer):
    """Grows like its base; tokens that leave the window are replaced by what their codes stand for."""

    def __init__(self, codec: FakeQuantizedCodec) -> None:
        """Store the codec."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.codec = codec
        self.packed = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens and return all keys and values; the new tokens are seen as they are, as in `TurboQuantCache`."""
        held = self.get_seq_length()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        block, sinks = self.codec.block_length, self.codec.sink_length
        target = min(self.codec.packed_length(keys.shape[2]), max(0, held - sinks) // block * block)
        if target > self.packed:
            part = slice(sinks + self.packed, sinks + target)
            keys[:, :, part] = self.codec.keys(keys[:, :, part].float()).to(keys.dtype)
            values[:, :, part] = self.codec.values(values[:, :, part].float()).to(values.dtype)
            self.packed = target
        return keys, values
