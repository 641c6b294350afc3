"""transformers' own QuantizedCache, from outside: quanto or hqq, if they are installed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Final, Literal

from transformers import PreTrainedConfig, QuantizedCache

from turboquant_local.cache import TurboQuantCache, predict_bytes
from turboquant_local.errors import BackendError, EvaluationError

_GROUP: Final = 64
_RESIDUAL: Final = 128

_PACKAGES: Final = {"quanto": ("optimum.quanto", "optimum-quanto"), "hqq": ("hqq", "hqq")}
"""Backend: the module it needs, and the package that has it."""


@dataclass(frozen=True)
class TransformersQuantizedCache:
    """Groups of 64 channels with a scale and a zero point, and a recent window of up to 128 tokens.

    When its window is full it reads everything back and quantises it again. It keeps no sinks.

    Attributes:
        name: Its name in tables.
        backend: "quanto" (2 or 4 bits) or "hqq" (4 bits; other widths fail in transformers 5).
        bits: Bits a coordinate.
    """

    name: str
    backend: Literal["quanto", "hqq"]
    bits: int

    def missing(self) -> str | None:
        """Why it cannot run here; None if it can."""
        module, package = _PACKAGES[self.backend]
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        return None if found else f"not installed: pip install {package}"

    def cache(self, model_config: PreTrainedConfig) -> QuantizedCache:
        """A fresh, empty cache.

        Raises:
            BackendError: Its package is not installed.
        """
        if (reason := self.missing()) is not None:
            raise BackendError(f"codec={self.name!r}: {reason}, or leave it out")
        axis: dict[str, Any] = {"axis_key": 1, "axis_value": 1} if self.backend == "hqq" else {}
        return QuantizedCache(
            self.backend, model_config, nbits=self.bits, q_group_size=_GROUP, residual_length=_RESIDUAL, **axis
        )

    def seen(self, length: int) -> int:
        """How often the window was full before the newest of `length` tokens."""
        return (length - 1) // _RESIDUAL

    def stored_bytes(self, model_config: PreTrainedConfig, tokens: int) -> int:
        """Bytes of one sequence of `tokens` tokens of a 16-bit model, with a window half full.

        Raises:
            EvaluationError: The model has layers of several shapes.
        """
        reference = TurboQuantCache(model_config, "uncompressed", set_attention=False)
        if reference.kv_shape is None:
            raise EvaluationError(f"codec={self.name!r}: the model's layers differ in shape, so its bytes are unknown")
        heads, head_dim = reference.kv_shape
        packed = max(0, tokens - _RESIDUAL // 2)
        coordinates = 2 * len(reference.layers) * heads * head_dim * packed
        saved = 16 - self.bits - 32 / _GROUP
        return round(predict_bytes(model_config, "uncompressed", tokens) - coordinates * saved / 8)
