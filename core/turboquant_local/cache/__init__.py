"""The compressed cache for transformers."""

from turboquant_local.cache.accounting import MemoryReport, predict_bytes
from turboquant_local.cache.cache import TurboQuantCache
from turboquant_local.cache.handle import KVHandle

__all__ = ["KVHandle", "MemoryReport", "TurboQuantCache", "predict_bytes"]
