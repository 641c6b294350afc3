"""Run chat models locally with a KV cache compressed by TurboQuant (arXiv 2504.19874)."""

from turboquant_local import attention  # noqa: F401  registers "turboquant" with transformers
from turboquant_local.cache import MemoryReport, TurboQuantCache, predict_bytes
from turboquant_local.config import PRESETS, TurboQuantConfig
from turboquant_local.engine import ChatEngine
from turboquant_local.errors import TurboQuantError

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "ChatEngine",
    "MemoryReport",
    "TurboQuantCache",
    "TurboQuantConfig",
    "TurboQuantError",
    "predict_bytes",
]
