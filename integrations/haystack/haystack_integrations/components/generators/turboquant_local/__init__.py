"""Chat models on your own machine with a compressed KV cache, as a Haystack component."""

from haystack_integrations.components.generators.turboquant_local.chat.chat_generator import (
    TurboQuantLocalChatGenerator,
)
from haystack_integrations.components.generators.turboquant_local.metrics_callback import (
    MetricsCallback,
    StreamMetrics,
)

__all__ = ["MetricsCallback", "StreamMetrics", "TurboQuantLocalChatGenerator"]
