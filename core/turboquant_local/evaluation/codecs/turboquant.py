"""This package's own cache among the codecs."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from turboquant_local.cache import TurboQuantCache, predict_bytes
from turboquant_local.config import TurboQuantConfig


@dataclass(frozen=True)
class TurboQuantCodec:
    """A `TurboQuantCache` with its settings.

    Attributes:
        name: Its name in tables.
        kv_cache: The settings.
    """

    name: str
    kv_cache: TurboQuantConfig

    def cache(self, model_config: PreTrainedConfig) -> TurboQuantCache:
        """A fresh, empty cache for a model."""
        return TurboQuantCache(model_config, self.kv_cache)

    def packed_length(self, length: int) -> int:
        """Tokens that are stored compressed once a sequence has `length` tokens."""
        return self.kv_cache.packed_length(length)

    def stored_bytes(self, model_config: PreTrainedConfig, tokens: int) -> int:
        """Bytes of one sequence of `tokens` tokens of a 16-bit model.

        Raises:
            ConfigError: The model has layers whose size does not follow from its config.
        """
        return predict_bytes(model_config, self.kv_cache, tokens)
