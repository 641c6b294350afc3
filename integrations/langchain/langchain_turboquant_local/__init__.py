"""Chat models on your own machine with a compressed KV cache, as a LangChain chat model."""

from langchain_turboquant_local.callbacks import (
    RunMetrics,
    TotalMetrics,
    TurboQuantMetricsCallbackHandler,
    get_turboquant_callback,
)
from langchain_turboquant_local.chat_models import ChatTurboQuantLocal

__all__ = [
    "ChatTurboQuantLocal",
    "RunMetrics",
    "TotalMetrics",
    "TurboQuantMetricsCallbackHandler",
    "get_turboquant_callback",
]
