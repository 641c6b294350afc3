import asyncio
import copy
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from haystack.components.generators.utils import print_streaming_chunk
from haystack.dataclasses import StreamingChunk, ToolCall, ToolCallResult

from haystack_integrations.components.generators.turboquant_local import MetricsCallback
from turboquant_local.errors import ConfigError


def _first() -> StreamingChunk:
    return StreamingChunk("Hel", index=0, start=True, meta={"model": "tiny"})


def _last(requested: float, tokens: int = 10) -> StreamingChunk:
    engine: dict[str, Any] = {
        "requested_at": datetime.fromtimestamp(requested, UTC).isoformat(),
        "tokens_per_second": 50.0,
        "prompt_tokens": 8,
        "completion_tokens": tokens,
        "cached_tokens": 4,
        "vram_bytes": 1_000,
        "uncompressed_bytes": 3_900,
        "compression_ratio": 3.9,
    }
    meta = {"model": "tiny", "usage": {"prompt_tokens": 8}, "turboquant": engine}
    return StreamingChunk("", index=0, finish_reason="stop", meta=meta)


def test_it_measures_what_the_caller_saw() -> None:
    callback = MetricsCallback()
    requested = time.time() - 1.0

    callback(_first())
    time.sleep(0.05)
    callback(_last(requested))

    assert callback.last is not None
    assert 1.0 <= callback.last.ttft <= callback.last.total_time - 0.05
    assert callback.last.tokens_per_second == pytest.approx(10 / callback.last.total_time)
    assert callback.last.chunks == 2
    assert callback.last.engine["vram_bytes"] == 1_000
    assert callback.last.usage == {"prompt_tokens": 8}
    for figure in ("decode 50.0", "8 + 10 tokens", "4 of them cached", "1,000 B instead of 3,900 B (3.90x)"):
        assert figure in callback.summary()


def test_without_a_reply_it_says_so() -> None:
    assert MetricsCallback().last is None
    assert MetricsCallback().summary() == "no reply was streamed"


def test_it_hands_every_chunk_on_and_ignores_tool_results() -> None:
    seen: list[StreamingChunk] = []
    callback = MetricsCallback(then=seen.append)
    result = StreamingChunk(
        "",
        index=0,
        start=True,
        tool_call_result=ToolCallResult("sunny", ToolCall("weather", {}), error=False),
        finish_reason="tool_call_results",
    )
    chunks = [_first(), _last(time.time()), result, _first(), _last(time.time())]

    for chunk in chunks:
        callback(chunk)

    assert seen == chunks
    assert [metrics.chunks for metrics in callback.replies] == [2, 2]


def test_an_abandoned_reply_leaves_no_trace() -> None:
    callback = MetricsCallback()

    callback(_first())
    time.sleep(0.05)
    requested = time.time()
    callback(_first())
    callback(_last(requested))

    assert callback.last is not None
    assert callback.last.ttft < 0.05
    assert callback.last.chunks == 2


async def test_replies_of_concurrent_tasks_are_told_apart() -> None:
    callback = MetricsCallback()

    async def stream(chunks: int) -> None:
        callback(_first())
        for _ in range(chunks - 2):
            await asyncio.sleep(0.001)
            callback(StreamingChunk("lo", index=0))
        await asyncio.sleep(0.001)
        callback(_last(time.time(), tokens=chunks))

    await asyncio.gather(stream(5), stream(9))

    assert {(metrics.chunks, metrics.engine["completion_tokens"]) for metrics in callback.replies} == {(5, 5), (9, 9)}


async def test_an_async_callback_behind_it_is_given_back_to_await() -> None:
    seen: list[str] = []

    async def then(chunk: StreamingChunk) -> None:
        seen.append(chunk.content)

    waiting = MetricsCallback(then)(_first())

    assert waiting is not None
    await waiting
    assert seen == ["Hel"]


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(ConfigError, match="then='print': expected a function or None"):
        MetricsCallback(then="print")  # type: ignore[arg-type]


def test_a_deep_copy_is_the_same_object() -> None:
    callback = MetricsCallback()

    assert copy.deepcopy({"llm": {"streaming_callback": callback}})["llm"]["streaming_callback"] is callback


def test_it_survives_yaml() -> None:
    for callback in (MetricsCallback(), MetricsCallback(print_streaming_chunk)):
        loaded = MetricsCallback.from_dict(callback.to_dict())
        assert loaded.then is callback.then
    nested = MetricsCallback.from_dict(MetricsCallback(MetricsCallback(print_streaming_chunk)).to_dict())
    assert isinstance(nested.then, MetricsCallback)
    assert nested.then.then is print_streaming_chunk
