"""Chunks come while the model runs, one payload each, and stop when nobody listens."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
from blockbuster import BlockingError, blockbuster_ctx
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_core.tools import BaseTool
from langchain_tests.utils.stream_lifecycle import assert_valid_event_stream

from langchain_turboquant_local import ChatTurboQuantLocal

FRANCE = "What is the capital of France?"
PARIS = "The capital of France is Paris."
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
THOUGHTFUL = f"<think>\nI need to look.\n</think>\n\nLet me see.\n{CALL}\n{CALL}"

MakeModel = Callable[..., ChatTurboQuantLocal]


def generating() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "turboquant-generation"]


def merged(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    full = chunks[0]
    for chunk in chunks[1:]:
        full += chunk
    return full


def test_the_first_chunk_comes_before_the_last_token(model: ChatTurboQuantLocal, gate: Callable[..., Any]) -> None:
    steps = gate(model, permits=1)
    stream = model.stream(FRANCE)
    assert next(stream).text == "The"
    assert steps.steps == 1
    steps.open()
    assert "The" + "".join(chunk.text for chunk in stream) == PARIS
    assert steps.steps > 1


async def test_the_same_without_blocking_the_loop(model: ChatTurboQuantLocal, gate: Callable[..., Any]) -> None:
    steps = gate(model, permits=1)
    stream = model.astream(FRANCE)
    assert (await anext(stream)).text == "The"
    assert steps.steps == 1
    steps.open()
    assert "The" + "".join([chunk.text async for chunk in stream]) == PARIS


def test_closing_ends_the_generation_within_one_token(model: ChatTurboQuantLocal, gate: Callable[..., Any]) -> None:
    steps = gate(model, permits=3)
    stream = model.stream(FRANCE)
    next(stream)
    threading.Timer(0.1, steps.open).start()  # close() waits for the step that the gate holds
    stream.close()
    assert steps.steps <= 4
    assert not generating()


async def test_so_does_closing_an_async_stream(model: ChatTurboQuantLocal, gate: Callable[..., Any]) -> None:
    steps = gate(model, permits=3)
    async with aclosing(model.astream(FRANCE)) as stream:
        await anext(stream)
    await asyncio.sleep(0.1)
    steps.open()
    async with asyncio.timeout(10):
        while generating():
            await asyncio.sleep(0.01)
    assert steps.steps <= 4


async def test_so_does_cancelling_a_task(model: ChatTurboQuantLocal, gate: Callable[..., Any]) -> None:
    steps = gate(model, permits=3)
    task = asyncio.create_task(model.ainvoke(FRANCE))
    while steps.steps < 3:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0.1)
    steps.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(10):
        while generating():
            await asyncio.sleep(0.01)
    assert steps.steps <= 4


async def test_nothing_blocks_the_event_loop(model: ChatTurboQuantLocal) -> None:
    with blockbuster_ctx(["langchain_turboquant_local", "turboquant_local"]):
        with pytest.raises(BlockingError):
            model._call([HumanMessage("Hi")], None, {})  # looks at files: the watch works
        assert (await model.ainvoke(FRANCE)).text == PARIS
        assert "".join([chunk.text async for chunk in model.astream(FRANCE)]) == PARIS


@pytest.mark.parametrize("version", ["v0", "v1"])
@pytest.mark.parametrize("is_async", [False, True])
async def test_reasoning_text_and_calls_are_blocks_in_one_row(
    make_model: MakeModel, weather: BaseTool, script: Callable[..., Any], version: str, is_async: bool
) -> None:
    model = make_model(output_version=version, max_tokens=200)
    script(model, THOUGHTFUL)
    bound = model.bind_tools([weather])
    chunks = [chunk async for chunk in bound.astream("Hi")] if is_async else list(bound.stream("Hi"))
    full = merged(chunks)
    assert [call["args"] for call in full.tool_calls] == [{"city": "Łódź"}] * 2
    assert full.tool_calls[0]["id"] != full.tool_calls[1]["id"]
    assert full.text == "Let me see."
    blocks = {block["type"]: block for block in full.content_blocks}
    assert list(blocks) == ["reasoning", "text", "tool_call"]
    assert blocks["reasoning"]["reasoning"] == "I need to look."
    assert ("reasoning_content" in full.additional_kwargs) == (version == "v0")

    indices = [block["index"] for chunk in chunks for block in chunk.content_blocks if "index" in block]
    assert indices == sorted(indices)
    assert {chunk["index"] for chunk in full.tool_call_chunks} == {2, 3}
    for chunk in chunks[:-1]:
        payloads = [chunk.text, chunk.tool_call_chunks, chunk.additional_kwargs or chunk.content_blocks]
        assert not (chunk.text and chunk.tool_call_chunks), payloads
        assert chunk.usage_metadata is None
        assert chunk.chunk_position is None
        assert "turboquant" not in chunk.response_metadata
    assert chunks[-1].chunk_position == "last"
    assert chunks[-1].usage_metadata is not None
    assert chunks[-1].response_metadata["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_invoke_gives_what_the_stream_adds_up_to(
    make_model: MakeModel, weather: BaseTool, script: Callable[..., Any], version: str
) -> None:
    model = make_model(output_version=version, max_tokens=200)
    script(model, THOUGHTFUL, THOUGHTFUL)
    bound = model.bind_tools([weather])
    streamed, invoked = merged(list(bound.stream("Hi"))), bound.invoke("Hi")
    assert invoked.text == streamed.text
    assert invoked.additional_kwargs == streamed.additional_kwargs
    types = ["reasoning", "text", "tool_call", "tool_call"]
    assert [block["type"] for block in streamed.content_blocks] == types
    assert [block["type"] for block in invoked.content_blocks] == types
    assert [call["args"] for call in invoked.tool_calls] == [call["args"] for call in streamed.tool_calls]


@pytest.mark.parametrize("version", ["v0", "v1"])
async def test_protocol_events_follow_the_rules(
    make_model: MakeModel, weather: BaseTool, script: Callable[..., Any], version: str
) -> None:
    model = make_model(output_version=version, max_tokens=200)
    script(model, THOUGHTFUL, THOUGHTFUL)
    bound = model.bind_tools([weather])
    sync_stream = bound.stream_events("Hi", version="v3")
    async_stream = await bound.astream_events("Hi", version="v3")
    for events, message in (
        (list(sync_stream), sync_stream.output),
        ([event async for event in async_stream], await async_stream.output),
    ):
        assert_valid_event_stream(events)
        assert [block["type"] for block in message.content_blocks] == ["reasoning", "text", "tool_call", "tool_call"]
        assert message.response_metadata["turboquant"]["vram_bytes"] > 0
        assert message.usage_metadata is not None


def test_thinking_is_kept_from_the_text(make_model: MakeModel) -> None:
    answer = make_model(reasoning=True).invoke(FRANCE)
    assert answer.content == PARIS
    assert answer.additional_kwargs["reasoning_content"] == f"The user asks: {FRANCE}"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_token_details"]["reasoning"] > 5
    silent = make_model().invoke(FRANCE, reasoning=False)
    assert silent.content == PARIS
    assert not silent.additional_kwargs


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_may_span_tokens_and_is_never_shown(model: ChatTurboQuantLocal, stream: bool) -> None:
    stop = "ital of Fr"
    if stream:
        texts = [chunk.text for chunk in model.stream(FRANCE, stop=[stop])]
        assert "".join(texts) == "The cap"
    else:
        assert model.invoke(FRANCE, stop=[stop]).text == "The cap"
    whole = [chunk.text for chunk in model.stream(FRANCE, stop=["ital of Germany"])]
    assert "".join(whole) == PARIS


class Tokens(BaseCallbackHandler):
    def __init__(self) -> None:
        self.chunks: list[Any] = []

    def on_llm_new_token(self, token: Any, *, chunk: Any = None, **kwargs: Any) -> None:
        self.chunks.append(chunk)


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])
async def test_callbacks_get_every_chunk_once(model: ChatTurboQuantLocal, way: str) -> None:
    tokens = Tokens()
    config: Any = {"callbacks": [tokens]}
    if way == "invoke":
        message = model.invoke(FRANCE, config)
    elif way == "ainvoke":
        message = await model.ainvoke(FRANCE, config)
    elif way == "stream":
        message = merged(list(model.stream(FRANCE, config)))
    else:
        message = merged([chunk async for chunk in model.astream(FRANCE, config)])
    assert "".join(chunk.text for chunk in tokens.chunks) == message.text == PARIS
    assert {chunk.message.id for chunk in tokens.chunks} == {message.id}
    assert tokens.chunks[-1].message.chunk_position == "last"
