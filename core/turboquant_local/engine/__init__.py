"""Load a chat model, generate with a compressed KV cache, stream, and measure."""

from turboquant_local.engine.chat_engine import ChatEngine
from turboquant_local.engine.types import (
    ChatReply,
    Finished,
    GenerationMetrics,
    GenerationOptions,
    Message,
    ReasoningDelta,
    StreamEvent,
    TextDelta,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
)

__all__ = [
    "ChatEngine",
    "ChatReply",
    "Finished",
    "GenerationMetrics",
    "GenerationOptions",
    "Message",
    "ReasoningDelta",
    "StreamEvent",
    "TextDelta",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "Usage",
]
