import asyncio
import json
from collections.abc import AsyncGenerator, Generator
from typing import Any

import pytest
from haystack.components.generators.utils import _convert_streaming_chunks_to_chat_message
from haystack.dataclasses import ComponentInfo, StreamingChunk

from haystack_integrations.components.generators.turboquant_local.chat.messages import to_chat_message
from haystack_integrations.components.generators.turboquant_local.chat.meta import reply_meta
from haystack_integrations.components.generators.turboquant_local.chat.streaming import (
    ChunkWriter,
    deliver,
    deliver_async,
)
from turboquant_local.engine.types import (
    ChatReply,
    Finished,
    FinishReason,
    GenerationMetrics,
    ReasoningDelta,
    StreamEvent,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from turboquant_local.errors import ConfigError

REQUESTED = "2026-01-02T03:04:05+00:00"
METRICS = GenerationMetrics(
    ttft=0.5,
    tokens_per_second=10.0,
    total_time=1.5,
    prompt_tokens=7,
    completion_tokens=11,
    cached_tokens=3,
    cache_tokens=17,
    vram_bytes=100,
    uncompressed_bytes=400,
    compression_ratio=4.0,
    peak_device_memory=None,
    attention={"reference": 8},
    packing={"reference": 4},
    materialized=0,
    bypassed_layers={"3": "sliding window"},
    decoding="cuda graph",
    device="cpu",
    dtype="bfloat16",
    kv_cache={"preset": "balanced"},
)
CALLS = (
    ToolCall("weather", {"where": {"city": "Paris", "zip": [75, None]}}, "call_a"),
    ToolCall("time", {}, "call_b"),
)


def _reply(finish: FinishReason, text: str = "", reasoning: str = "", calls: tuple[ToolCall, ...] = ()) -> ChatReply:
    return ChatReply(
        text=text,
        reasoning=reasoning,
        tool_calls=calls,
        finish_reason=finish,
        usage=Usage(7, 11, 3, 2),
        metrics=METRICS,
        token_ids=tuple(range(11)),
        first_token_at=REQUESTED,
    )


SCRIPTS: dict[str, list[StreamEvent]] = {
    "text": [TextDelta("Par"), TextDelta("is."), Finished(_reply("stop", "Paris."))],
    "all": [
        ReasoningDelta("Two "),
        ReasoningDelta("calls."),
        TextDelta("Wait é"),
        TextDelta("\n"),
        ToolCallDelta(0, CALLS[0]),
        ToolCallDelta(1, CALLS[1]),
        Finished(_reply("tool_calls", "Wait é\n", "Two calls.", CALLS)),
    ],
    "cut": [TextDelta("Par"), Finished(_reply("length", "Par"))],
    "cancelled": [TextDelta("Par"), Finished(_reply("cancelled", "Par"))],
    "empty": [Finished(_reply("stop"))],
}


def _writer() -> ChunkWriter:
    return ChunkWriter("tiny", ComponentInfo("generator"), REQUESTED)


@pytest.mark.parametrize("name", SCRIPTS)
def test_haystacks_own_joining_of_chunks_gives_the_reply(name: str) -> None:
    writer = _writer()
    chunks = [writer.write(event) for event in SCRIPTS[name]]
    finished = SCRIPTS[name][-1]
    assert isinstance(finished, Finished)
    message = to_chat_message(finished.reply, reply_meta(finished.reply, "tiny", REQUESTED))

    joined = _convert_streaming_chunks_to_chat_message(chunks)

    assert joined._content == message._content
    for key in ("model", "index", "finish_reason", "usage"):
        assert joined.meta[key] == message.meta[key]


def test_blocks_are_numbered_and_opened_once() -> None:
    writer = _writer()
    chunks = [writer.write(event) for event in SCRIPTS["all"]]

    assert [(chunk.index, chunk.start) for chunk in chunks] == [
        (0, True),
        (0, False),
        (1, True),
        (1, False),
        (2, True),
        (3, True),
        (3, False),
    ]
    assert [call.index for chunk in chunks for call in chunk.tool_calls or ()] == [0, 1]
    assert [chunk.finish_reason for chunk in chunks] == [None] * 6 + ["tool_calls"]


def test_the_last_chunk_carries_the_replys_meta() -> None:
    writer = _writer()
    chunks = [writer.write(event) for event in SCRIPTS["cancelled"]]

    last = chunks[-1]
    assert last.finish_reason == last.meta["finish_reason"] == "stop"
    assert last.meta["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 11,
        "total_tokens": 18,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    assert last.meta["turboquant"] == {"requested_at": REQUESTED, **METRICS.to_dict()}
    assert json.loads(json.dumps(last.to_dict())) == last.to_dict()
    assert all(chunk.meta["model"] == "tiny" and chunk.meta["received_at"] for chunk in chunks)


class _Closable:
    """Events that tell how far they were read and whether they were closed."""

    def __init__(self) -> None:
        self.read = 0
        self.closed = False

    def sync(self) -> Generator[StreamEvent, None, None]:
        try:
            for event in SCRIPTS["all"]:
                self.read += 1
                yield event
        finally:
            self.closed = True

    async def live(self) -> AsyncGenerator[StreamEvent, None]:
        try:
            for event in SCRIPTS["all"]:
                self.read += 1
                yield event
        finally:
            self.closed = True


def test_a_failing_callback_closes_the_events() -> None:
    events = _Closable()

    def fail(chunk: StreamingChunk) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        deliver(events.sync(), _writer(), fail)
    assert (events.read, events.closed) == (1, True)


def test_an_awaitable_from_a_callback_is_refused_in_run() -> None:
    events = _Closable()

    async def answer() -> None: ...

    def hidden(chunk: StreamingChunk) -> Any:
        return answer()

    with pytest.raises(ConfigError, match="use run_async"):
        deliver(events.sync(), _writer(), hidden)
    assert events.closed


async def test_a_cancelled_task_closes_the_events() -> None:
    events = _Closable()
    waiting = asyncio.Event()

    async def hang(chunk: StreamingChunk) -> None:
        waiting.set()
        await asyncio.sleep(60)

    task = asyncio.create_task(deliver_async(events.live(), _writer(), hang))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (events.read, events.closed) == (1, True)


async def test_sync_and_async_callbacks_see_every_event_in_this_task() -> None:
    seen: list[tuple[str, object]] = []

    async def slow(chunk: StreamingChunk) -> None:
        await asyncio.sleep(0.001)
        seen.append(("slow", asyncio.current_task()))

    reply = await deliver_async(_Closable().live(), _writer(), slow)
    await deliver_async(_Closable().live(), _writer(), lambda chunk: seen.append(("sync", asyncio.current_task())))

    assert reply.tool_calls == CALLS
    assert seen == [(kind, asyncio.current_task()) for kind in ("slow", "sync") for _ in SCRIPTS["all"]]
