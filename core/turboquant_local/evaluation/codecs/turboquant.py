"""This package's own cache among the codecs."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from turboquant_local.cache import TurboQuantCache, predict_bytes
from turboquant_local.cache.storage import targets
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

    def seen(self, length: int) -> tuple[int, int]:
        """Packed tokens that the newest of `length` tokens sees, and how many of them are far ones.

        A token sees itself uncompressed, so the block that it completes is packed behind it.
        """
        return targets(self.kv_cache, length, among_first=length - 1)

    def stored_bytes(self, model_config: PreTrainedConfig, tokens: int) -> int:
        """Bytes of one sequence of `tokens` tokens of a 16-bit model.

        Raises:
            ConfigError: The model has layers whose size does not follow from its config.
        """
        return predict_bytes(model_config, self.kv_cache, tokens)
