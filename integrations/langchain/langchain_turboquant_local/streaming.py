"""The engine's events as LangChain's chunks."""

from __future__ import annotations

import json
from typing import Any, Final

from langchain_core.messages import AIMessageChunk, InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk

from turboquant_local.engine import types as engine

PROVIDER: Final = "turboquant_local"
"""Who speaks. It must not be the name of a provider whose messages LangChain translates."""


class ChunkWriter:
    """Turns the events of one reply into chunks: one payload each, all blocks numbered in one row.

    What merges badly (names, times, usage) stands in the last chunk alone.

    Args:
        model: Name or folder of the model.
        blocks: Write content as standard blocks (`output_version="v1"`) instead of strings.
        message_id: Given to every chunk; None leaves it to LangChain.
    """

    def __init__(self, model: str, *, blocks: bool, message_id: str | None = None) -> None:
        self._model = model
        self._blocks = blocks
        self._message_id = message_id
        self._index = -1
        self._kind: type[engine.StreamEvent] | None = None

    def write(self, event: engine.StreamEvent) -> ChatGenerationChunk:
        """The chunk of one event; that of `Finished` is the last, with usage and metadata."""
        if isinstance(event, engine.Finished):
            return self._chunk(
                usage_metadata=usage_metadata(event.reply.usage),
                response_metadata=response_metadata(event.reply, self._model),
                chunk_position="last",
            )
        # Every tool call is a block of its own; text and thinking go on until the other one begins.
        self._index += type(event) is not self._kind or isinstance(event, engine.ToolCallDelta)
        self._kind = type(event)
        if isinstance(event, engine.ToolCallDelta):
            call = tool_call_chunk(
                name=event.call.name,
                args=json.dumps(event.call.arguments, ensure_ascii=False),
                id=event.call.id,
                index=self._index,
            )
            return self._chunk(tool_call_chunks=[call])
        if isinstance(event, engine.TextDelta):
            return self._chunk(
                content=[{"type": "text", "text": event.text, "index": self._index}] if self._blocks else event.text
            )
        if self._blocks:
            return self._chunk(content=[{"type": "reasoning", "reasoning": event.text, "index": self._index}])
        return self._chunk(additional_kwargs={"reasoning_content": event.text})

    def _chunk(self, content: str | list[Any] = "", **fields: Any) -> ChatGenerationChunk:
        return ChatGenerationChunk(message=AIMessageChunk(content=content, id=self._message_id, **fields))


def usage_metadata(usage: engine.Usage) -> UsageMetadata:
    """Token counts in LangChain's shape."""
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
        output_token_details=OutputTokenDetails(reasoning=usage.reasoning_tokens),
    )


def response_metadata(reply: engine.ChatReply, model: str) -> dict[str, Any]:
    """What a reply says about itself, JSON-safe; the engine's metrics stand under "turboquant"."""
    return {
        "model_provider": PROVIDER,
        "model_name": model,
        "finish_reason": reply.openai_finish_reason,
        "turboquant": reply.metrics.to_dict(),
    }
