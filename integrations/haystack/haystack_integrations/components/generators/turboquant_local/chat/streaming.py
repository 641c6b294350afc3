"""The engine's live events as Haystack's streaming chunks, given to a callback where the caller runs."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, closing
from typing import Any

from haystack.dataclasses import (
    ComponentInfo,
    ReasoningContent,
    StreamingChunk,
    ToolCallDelta,
)

from haystack_integrations.components.generators.turboquant_local.chat.meta import now, reply_meta
from turboquant_local.engine import types as engine
from turboquant_local.errors import ConfigError


class ChunkWriter:
    """Turns the events of one reply into chunks: one payload each, blocks numbered and opened with `start`.

    Args:
        model: Name or folder of the model, for the chunks' meta.
        component_info: Which component speaks.
        requested_at: Wall clock of the request, ISO 8601.
    """

    def __init__(self, model: str, component_info: ComponentInfo, requested_at: str) -> None:
        self._model = model
        self._component_info = component_info
        self._requested_at = requested_at
        self._block = -1
        self._kind: type[engine.StreamEvent] | None = None

    def write(self, event: engine.StreamEvent) -> StreamingChunk:
        """The chunk of one event; that of `Finished` is the last, with the finish reason and all counts."""
        if isinstance(event, engine.Finished):
            return self._chunk(
                meta=reply_meta(event.reply, self._model, self._requested_at),
                finish_reason=event.reply.openai_finish_reason,
                start=self._block < 0,
            )
        # Every tool call is a block of its own; text and thinking go on until the other one begins.
        start = type(event) is not self._kind or isinstance(event, engine.ToolCallDelta)
        self._kind = type(event)
        self._block += start
        if isinstance(event, engine.TextDelta):
            return self._chunk(content=event.text, start=start)
        if isinstance(event, engine.ReasoningDelta):
            return self._chunk(reasoning=ReasoningContent(event.text), start=start)
        delta = ToolCallDelta(
            index=event.index,
            tool_name=event.call.name,
            arguments=json.dumps(event.call.arguments, ensure_ascii=False),
            id=event.call.id,
        )
        return self._chunk(tool_calls=[delta], start=start)

    def _chunk(self, content: str = "", meta: dict[str, Any] | None = None, **fields: Any) -> StreamingChunk:
        return StreamingChunk(
            content=content,
            meta={"model": self._model, **(meta or {}), "received_at": now()},
            component_info=self._component_info,
            index=max(self._block, 0),
            **fields,
        )


def deliver(
    events: Generator[engine.StreamEvent], writer: ChunkWriter, callback: Callable[[StreamingChunk], object]
) -> engine.ChatReply:
    """Call the callback with every chunk, in this thread, and return the reply.

    An exception in the callback closes the events, which cancels the generation.

    Raises:
        ConfigError: The callback returned something to await.
    """
    with closing(events):
        for event in events:
            result = callback(writer.write(event))
            if inspect.isawaitable(result):
                if inspect.iscoroutine(result):
                    result.close()
                raise ConfigError(
                    f"streaming_callback={callback!r}: returned an awaitable in run(); use run_async or a sync callback"
                )
            if isinstance(event, engine.Finished):
                reply = event.reply
    return reply


async def deliver_async(
    events: AsyncGenerator[engine.StreamEvent],
    writer: ChunkWriter,
    callback: Callable[[StreamingChunk], object] | None,
) -> engine.ChatReply:
    """Call, and if need be await, the callback with every chunk in this task, and return the reply.

    A cancelled task or an exception in the callback closes the events, which cancels the generation.
    """
    async with aclosing(events):
        async for event in events:
            if callback is not None:
                result = callback(writer.write(event))
                if inspect.isawaitable(result):
                    await result
            if isinstance(event, engine.Finished):
                reply = event.reply
    return reply
