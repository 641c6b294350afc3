import asyncio
import contextvars
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from haystack import Pipeline
from haystack.components.generators.utils import _convert_streaming_chunks_to_chat_message
from haystack.dataclasses import ChatMessage, StreamingChunk
from haystack.tools import Tool

from haystack_integrations.components.generators.turboquant_local import MetricsCallback, TurboQuantLocalChatGenerator

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
COUNT = "Count from 1 to 40."
LONG = {"max_new_tokens": 150}


def _is_generating() -> bool:
    return any(thread.name == "turboquant-generation" for thread in threading.enumerate())


async def _has_stopped() -> bool:
    """A thread that said its last word needs a moment to end; the tokens that were not wanted would take longer."""
    for _ in range(50):
        if not _is_generating():
            return True
        await asyncio.sleep(0.01)
    return False


async def _ask(generator: TurboQuantLocalChatGenerator, question: str, **words: object) -> ChatMessage:
    reply: ChatMessage = (await generator.run_async(question, **words))["replies"][0]  # type: ignore[arg-type]
    return reply


async def test_the_answer_is_that_of_run(generator: TurboQuantLocalChatGenerator) -> None:
    reply = await _ask(generator, QUESTION)

    assert reply._content == generator.run(QUESTION)["replies"][0]._content
    assert await generator.run_async([]) == {"replies": []}


async def test_a_slow_async_callback_loses_nothing(generator: TurboQuantLocalChatGenerator, weather: Tool) -> None:
    chunks: list[StreamingChunk] = []

    async def slow(chunk: StreamingChunk) -> None:
        await asyncio.sleep(0.02)
        chunks.append(chunk)

    for question in (QUESTION, "What is the weather in Paris?"):
        chunks.clear()
        reply = await _ask(generator, question, streaming_callback=slow, tools=[weather])
        assert _convert_streaming_chunks_to_chat_message(chunks)._content == reply._content
        assert chunks[-1].finish_reason == reply.meta["finish_reason"]
    assert reply.tool_calls[0].arguments == {"city": "Paris"}


async def test_chunks_come_while_tokens_are_generated(generator: TurboQuantLocalChatGenerator) -> None:
    generating: list[bool] = []
    metrics = MetricsCallback()

    async def callback(chunk: StreamingChunk) -> None:
        metrics(chunk)
        generating.append(_is_generating())

    await _ask(generator, COUNT, streaming_callback=callback, generation_kwargs=LONG)

    assert generating[0]
    assert metrics.last is not None
    assert metrics.last.ttft < metrics.last.engine["total_time"] / 2


async def test_the_loop_is_free_while_tokens_are_generated(generator: TurboQuantLocalChatGenerator) -> None:
    task = asyncio.create_task(_ask(generator, COUNT, generation_kwargs=LONG))
    ticks = 0
    while not task.done():
        await asyncio.sleep(0.01)
        ticks += 1

    assert ticks > 5


async def test_callbacks_run_in_the_callers_task_and_context(generator: TurboQuantLocalChatGenerator) -> None:
    request_id = contextvars.ContextVar("request_id", default="none")
    request_id.set("mine")
    seen = set()

    async def callback(chunk: StreamingChunk) -> None:
        seen.add((asyncio.current_task(), request_id.get()))

    await _ask(generator, QUESTION, streaming_callback=callback)

    assert seen == {(asyncio.current_task(), "mine")}


async def test_a_sync_callback_will_do(
    generator: TurboQuantLocalChatGenerator, caplog: pytest.LogCaptureFixture
) -> None:
    chunks: list[StreamingChunk] = []
    with caplog.at_level(logging.WARNING):
        await _ask(generator, QUESTION, streaming_callback=chunks.append)

    assert "".join(chunk.content for chunk in chunks) == ANSWER
    assert "sync streaming callback" in caplog.text


@pytest.mark.parametrize("streamed", [True, False])
async def test_cancelling_stops_the_generation(generator: TurboQuantLocalChatGenerator, streamed: bool) -> None:
    started = asyncio.Event()

    async def callback(chunk: StreamingChunk) -> None:
        started.set()

    words = {"streaming_callback": callback} if streamed else {}
    task = asyncio.create_task(_ask(generator, COUNT, generation_kwargs=LONG, **words))
    if streamed:
        await started.wait()
    else:
        while generator._engine is None or not _is_generating():
            await asyncio.sleep(0)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert await _has_stopped()
    assert generator._engine is not None
    metrics = generator._engine.last_metrics
    assert metrics is None or metrics.completion_tokens < 60  # of some 120
    assert (await _ask(generator, QUESTION)).text == ANSWER


async def test_an_error_reaches_the_caller(generator: TurboQuantLocalChatGenerator) -> None:
    async def callback(chunk: StreamingChunk) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        await generator.run_async(COUNT, streaming_callback=callback)
    with pytest.raises(ValueError, match="context"):
        await generator.run_async("word " * 5_000)
    assert await _has_stopped()


async def test_two_runs_at_once_on_one_component(generator: TurboQuantLocalChatGenerator) -> None:
    async def ask(country: str) -> tuple[str | None, str]:
        pieces: list[str] = []

        async def callback(chunk: StreamingChunk) -> None:
            await asyncio.sleep(0.005)
            pieces.append(chunk.content)

        reply = await _ask(generator, f"What is the capital of {country}?", streaming_callback=callback)
        return reply.text, "".join(pieces)

    answers = await asyncio.gather(ask("France"), ask("Italy"))

    assert answers == [(text, text) for text in (ANSWER, "The capital of Italy is Rome.")]


async def test_the_model_is_loaded_in_the_given_executor(tiny_model: str) -> None:
    names: list[str] = []

    class Recording(ThreadPoolExecutor):
        def submit(self, work, /, *args, **kwargs):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN003, ANN202
            names.append(work.__name__)
            return super().submit(work, *args, **kwargs)

    with Recording(max_workers=1) as executor:
        generator = TurboQuantLocalChatGenerator(model=tiny_model, async_executor=executor)
        await generator.warm_up_async()
        await generator.warm_up_async()
        assert (await _ask(generator, QUESTION)).text == ANSWER
        generator.close()

    assert names == ["_ready"]


@pytest.fixture
def pipeline(generator: TurboQuantLocalChatGenerator) -> Pipeline:
    pipeline = Pipeline()
    pipeline.add_component("llm", generator)
    return pipeline


async def test_pipeline_run_async(pipeline: Pipeline) -> None:
    result = await pipeline.run_async({"llm": {"messages": QUESTION}})

    assert result["llm"]["replies"][0].text == ANSWER


async def test_pipeline_stream_is_live(pipeline: Pipeline) -> None:
    handle = pipeline.stream({"llm": {"messages": COUNT, "generation_kwargs": LONG}})
    chunks: list[StreamingChunk] = []
    generating: list[bool] = []

    async for chunk in handle:
        chunks.append(chunk)
        generating.append(_is_generating())

    reply = handle.result["llm"]["replies"][0]
    assert generating[0]
    assert "".join(chunk.content for chunk in chunks) == reply.text
    assert chunks[-1].meta["usage"] == reply.meta["usage"]
    assert {chunk.component_info.name for chunk in chunks if chunk.component_info} == {"llm"}


async def test_an_abandoned_pipeline_stream_stops_the_generation(pipeline: Pipeline) -> None:
    handle = pipeline.stream({"llm": {"messages": COUNT, "generation_kwargs": LONG}})
    chunks = handle.__aiter__()
    await anext(chunks)
    await chunks.aclose()  # type: ignore[attr-defined]

    assert await _has_stopped()


async def test_a_metrics_callback_given_to_a_pipeline_run_is_not_copied(pipeline: Pipeline) -> None:
    metrics = MetricsCallback()

    await pipeline.run_async({"llm": {"messages": QUESTION, "streaming_callback": metrics}})
    await asyncio.to_thread(pipeline.run, {"llm": {"messages": QUESTION, "streaming_callback": metrics}})

    assert [reply.usage["completion_tokens"] for reply in metrics.replies] == [8, 8]
