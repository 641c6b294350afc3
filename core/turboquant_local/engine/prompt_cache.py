"""The KV cache that an engine keeps between calls, with the token ids it holds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from itertools import takewhile

from transformers import PreTrainedModel

from turboquant_local.cache import TurboQuantCache
from turboquant_local.cache.cache import SKIPPED
from turboquant_local.config import AUTO, TurboQuantConfig
from turboquant_local.engine.decode_loop import DecodeLoop
from turboquant_local.engine.prefill import continues, first_part, rotation_limit

logger = logging.getLogger(__name__)


class PromptCache:
    """Keeps the KV cache of the last generation, so that the next prompt computes only what is new in it.

    Args:
        config: How keys and values are stored; "auto" is filled in once the model is known.
    """

    def __init__(self, config: TurboQuantConfig) -> None:
        self.config = config
        self.explanation = ""
        self.cache: TurboQuantCache | None = None
        self.ids: list[int] = []
        self.decode_loop = DecodeLoop()
        self._is_long = False

    def prepare(self, model: PreTrainedModel, prompt_ids: Sequence[int]) -> tuple[TurboQuantCache, int]:
        """Keep what the cache shares with a prompt and drop the rest.

        Returns:
            The cache, and how many tokens of the prompt it holds: always fewer than the prompt has, as the last
            token must be run to get its logits.
        """
        if self.cache is None:
            self.cache = TurboQuantCache(model.config, kv_cache=self.config)
            if self.config.preset == AUTO:
                self.config, self.explanation = self.cache.kv_cache, self.cache.explanation
            self._log_bypassed(model, self.cache)
        self.cache.stats.reset()
        held = len(self.ids)
        common = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, prompt_ids[:-1], strict=False))
        )
        was_long, self._is_long = self._is_long, len(prompt_ids) > rotation_limit(model)
        is_whole = self._is_long and not first_part(model, self.cache, len(prompt_ids))
        if was_long != self._is_long or is_whole or not continues(model):
            common = 0  # its tokens are rotated for shorter sequences, or longer ones, or are to be seen exactly
        kept = common if common == held else self.cache.rewind(common)
        self.ids = self.ids[:kept]
        return self.cache, kept

    def record(self, ids: Sequence[int]) -> None:
        """Note the ids that were run: the cache holds all but the last ones, which no step has fed back."""
        assert self.cache is not None
        self.ids = list(ids[: self.cache.get_seq_length()])

    def drop(self) -> None:
        """Forget the cache. Also the answer to an error inside a forward pass, which leaves layers uneven."""
        self.cache, self.ids = None, []
        self.decode_loop.release()

    def vram_bytes(self) -> int:
        """Bytes that the kept cache holds."""
        kept = self.cache
        return kept.vram_bytes() if kept is not None else 0

    def _log_bypassed(self, model: PreTrainedModel, kept: TurboQuantCache) -> None:
        # Layers that the settings themselves skip are no surprise.
        layers = {layer: reason for layer, reason in kept.bypassed.items() if reason != SKIPPED}
        if layers:
            log_once(
                f"{model.config.model_type}: {len(layers)} of {len(kept.layers)} layers keep an uncompressed cache: "
                + ", ".join(f"{layer} ({reason})" for layer, reason in layers.items())
            )


@cache
def log_once(message: str) -> None:
    """Warn of something that would come with every reply."""
    logger.warning(message)
