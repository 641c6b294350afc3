"""Events come live; cancelling and closing end a generation within one token; calls take turns."""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import pytest

from turboquant_local.engine import (
    ChatEngine,
    ChatReply,
    Finished,
    GenerationOptions,
    Message,
    ReasoningDelta,
    StreamEvent,
    TextDelta,
    Tool,
    ToolCallDelta,
    loading,
    streaming,
)
from turboquant_local.engine.streaming import Cancellation, stream_events
from turboquant_local.errors import ModelLoadError

MakeEngine = Callable[..., ChatEngine]

CAPITAL = [Message("user", "What is the capital of France?")]
LONG = GenerationOptions(max_new_tokens=200, extra={"min_new_tokens": 200})
ANSWER = "The capital of France is Paris."
WEATHER = Tool(
    "get_weather", "Get the weather for a city", {"type": "object", "properties": {"city": {"type": "string"}}}
)


def joined(events: list[StreamEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def generation_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "turboquant-generation"]


def test_events_join_to_the_reply(engine: ChatEngine) -> None:
    events = list(engine.stream(CAPITAL))
    assert isinstance(events[-1], Finished)
    assert joined(events) == events[-1].reply.text == ANSWER
    assert len(events) > 5
    assert events[-1].reply.token_ids == engine.chat(CAPITAL).token_ids


def test_the_first_event_comes_while_the_model_still_generates(engine: ChatEngine, gate: Callable[..., object]) -> None:
    steps = gate(engine, permits=1)
    stream = engine.stream(CAPITAL)
    # The model may run only once: the first event cannot come from anything but the first token.
    assert next(stream) == TextDelta("The")
    assert steps.steps == 1
    steps.open(1)
    assert next(stream) == TextDelta(" capital")
    steps.open()
    assert isinstance(list(stream)[-1], Finished)


def test_reasoning_and_tool_calls_are_streamed(engine: ChatEngine) -> None:
    events = list(engine.stream(CAPITAL, options=GenerationOptions(enable_thinking=True, max_new_tokens=120)))
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    assert isinstance(events[-1], Finished)
    assert reasoning == events[-1].reply.reasoning != ""
    events = list(engine.stream([Message("user", "What is the weather in Paris?")], tools=[WEATHER]))
    assert isinstance(events[-1], Finished)
    assert [event.call for event in events if isinstance(event, ToolCallDelta)] == list(events[-1].reply.tool_calls)
    assert events[-1].reply.finish_reason == "tool_calls"


def test_a_stop_string_is_never_shown(engine: ChatEngine) -> None:
    events = list(engine.stream(CAPITAL, options=GenerationOptions(stop=("ce is",))))
    assert isinstance(events[-1], Finished)
    assert joined(events) == events[-1].reply.text == "The capital of Fran"


def test_cancel_from_another_thread_stops_within_one_token(engine: ChatEngine, gate: Callable[..., object]) -> None:
    expected = engine.chat(CAPITAL)
    steps, cancel = gate(engine, permits=4), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.chat, CAPITAL, options=LONG, cancel=cancel)
        while steps.steps < 4:
            time.sleep(0.001)
        cancel.set()
        steps.open()
        reply = running.result(timeout=60)
    assert reply.finish_reason == "cancelled"
    assert len(reply.token_ids) in (4, 5)
    assert steps.steps == len(reply.token_ids)
    assert reply.token_ids == expected.token_ids[: len(reply.token_ids)]
    assert reply.usage.completion_tokens == len(reply.token_ids)
    assert engine.chat(CAPITAL).token_ids == expected.token_ids


def test_a_cancelled_stream_still_finishes(engine: ChatEngine) -> None:
    cancel = threading.Event()
    events = []
    for event in engine.stream(CAPITAL, options=LONG, cancel=cancel):
        events.append(event)
        cancel.set()
    assert isinstance(events[-1], Finished)
    assert events[-1].reply.finish_reason == "cancelled"
    assert joined(events) == events[-1].reply.text
    assert len(events[-1].reply.token_ids) < 200


def test_a_call_that_is_cancelled_before_it_starts_generates_nothing(
    engine: ChatEngine, gate: Callable[..., object]
) -> None:
    steps, cancel = gate(engine), threading.Event()
    cancel.set()
    reply = engine.chat(CAPITAL, cancel=cancel)
    assert (reply.text, reply.token_ids, reply.finish_reason) == ("", (), "cancelled")
    assert (reply.metrics.ttft, reply.metrics.vram_bytes, reply.first_token_at) == (0.0, 0, "")
    assert steps.steps == 0


def test_closing_a_stream_ends_the_generation(engine: ChatEngine, gate: Callable[..., object]) -> None:
    steps = gate(engine, permits=3)
    stream = engine.stream(CAPITAL, options=LONG)
    next(stream)
    threading.Timer(0.2, steps.open).start()
    stream.close()
    assert generation_threads() == []
    # Three were let through; the close was seen with the token after them at the latest.
    assert steps.steps <= 4
    assert engine.chat(CAPITAL).text == ANSWER


def test_a_stream_is_forgotten_in_its_own_thread(engine: ChatEngine) -> None:
    """As by the garbage collector, which closes it wherever it happens to run."""
    engine.load()
    assert engine._loaded is not None
    streams = [engine.stream(CAPITAL, options=LONG)]
    next(streams[0])
    hook = engine._loaded.model.register_forward_pre_hook(lambda *args: streams.clear())
    reply = ThreadPoolExecutor(1).submit(engine.chat, CAPITAL)
    assert reply.result(timeout=30).text == ANSWER
    hook.remove()
    assert generation_threads() == []


def test_an_error_in_the_consumer_ends_the_generation(engine: ChatEngine) -> None:
    def consume() -> None:
        for _ in engine.stream(CAPITAL, options=LONG):
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        consume()
    assert generation_threads() == []


def test_an_error_in_the_generation_is_raised_in_the_consumer(engine: ChatEngine) -> None:
    engine.load()
    assert engine._loaded is not None

    def fail(*args: object) -> None:
        raise RuntimeError("the device fell over")

    hook = engine._loaded.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="fell over"):
        next(engine.stream(CAPITAL))
    hook.remove()
    assert generation_threads() == []
    assert engine.chat(CAPITAL).text == ANSWER


def test_one_thread_serves_one_stream_after_another(engine: ChatEngine) -> None:
    """And another one, what runs at the same time; nothing of a generation is left in it."""
    value: ContextVar[str] = ContextVar("value", default="")
    seen: list[tuple[int, str]] = []

    def work(cancel: Cancellation, emit: Callable[[TextDelta], None]) -> ChatReply:
        seen.append((threading.get_ident(), value.get()))
        value.set("mine")
        emit(TextDelta("a"))
        return engine.chat(CAPITAL)

    for _ in range(2):
        list(stream_events(work, None))
    first, second = (stream_events(work, None) for _ in range(2))
    next(first), next(second)
    list(first), list(second)
    threads = [thread for thread, _ in seen]
    assert threads[0] == threads[1] in threads[2:]
    assert threads[2] != threads[3]
    assert {own for _, own in seen} == {""}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of Python 3.12: the child does nothing
def test_a_child_has_threads_of_its_own(engine: ChatEngine) -> None:
    list(engine.stream(CAPITAL))
    assert streaming._idle
    child = os.fork()
    if not child:
        os._exit(len(streaming._idle))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_stream_that_nobody_reads_starts_nothing(engine: ChatEngine) -> None:
    engine.stream(CAPITAL)
    assert generation_threads() == []


async def test_async_events_join_to_the_reply(engine: ChatEngine) -> None:
    events = [event async for event in engine.astream(CAPITAL)]
    assert isinstance(events[-1], Finished)
    assert joined(events) == events[-1].reply.text == ANSWER


async def test_async_events_are_live_and_the_loop_stays_free(engine: ChatEngine, gate: Callable[..., object]) -> None:
    steps = gate(engine, permits=1)
    stream = engine.astream(CAPITAL)
    assert await anext(stream) == TextDelta("The")
    assert steps.steps == 1
    # The model waits at the gate now; the loop does not wait with it.
    waiting = asyncio.ensure_future(anext(stream))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    steps.open()
    assert await waiting == TextDelta(" capital")
    assert isinstance([event async for event in stream][-1], Finished)


async def test_loading_does_not_block_the_loop(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    proceed = threading.Event()
    load = loading._load

    def slow_load(spec: loading.ModelSpec) -> loading.LoadedModel:
        assert proceed.wait(60)
        return load(spec)

    monkeypatch.setattr(loading, "_load", slow_load)
    stream = make_engine(dtype="float32").astream(CAPITAL)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.05)
    proceed.set()
    assert await first == TextDelta("The")
    await stream.aclose()


async def test_closing_an_async_stream_ends_the_generation(engine: ChatEngine, gate: Callable[..., object]) -> None:
    steps = gate(engine, permits=3)
    stream = engine.astream(CAPITAL, options=LONG)
    await anext(stream)
    asyncio.get_running_loop().call_later(0.2, steps.open)
    await stream.aclose()
    assert steps.steps <= 4
    assert (await asyncio.to_thread(engine.chat, CAPITAL)).text == ANSWER


async def test_cancelling_the_task_ends_the_generation(engine: ChatEngine, gate: Callable[..., object]) -> None:
    steps = gate(engine, permits=3)
    got_one = asyncio.Event()

    async def consume() -> None:
        async for _ in engine.astream(CAPITAL, options=LONG):
            got_one.set()

    task = asyncio.create_task(consume())
    await got_one.wait()
    asyncio.get_running_loop().call_later(0.2, steps.open)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps.steps <= 4


async def test_an_error_is_raised_in_the_task(make_engine: MakeEngine) -> None:
    with pytest.raises(ModelLoadError, match="no such folder"):
        await anext(make_engine("/no/such/folder").astream(CAPITAL))


def test_concurrent_calls_take_turns(engine: ChatEngine) -> None:
    questions = {"France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid"}
    start = threading.Barrier(len(questions))

    def ask(country: str) -> str:
        start.wait()
        return engine.chat([Message("user", f"What is the capital of {country}?")]).text

    with ThreadPoolExecutor(len(questions)) as pool:
        answers = dict(zip(questions, pool.map(ask, questions), strict=True))
    assert all(capital in answers[country] for country, capital in questions.items())


def test_a_waiting_call_leaves_when_it_is_cancelled(engine: ChatEngine, gate: Callable[..., object]) -> None:
    steps, cancel = gate(engine, permits=1), threading.Event()
    stream = engine.stream(CAPITAL)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.chat, CAPITAL, cancel=cancel)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        cancel.set()
        assert waiting.result(timeout=60).finish_reason == "cancelled"
    steps.open()
    assert isinstance(list(stream)[-1], Finished)


def test_two_engines_run_at_once_and_loading_waits_for_no_generation(
    make_engine: MakeEngine, gate: Callable[..., object]
) -> None:
    first, second = make_engine(), make_engine(kv_cache="uncompressed")
    steps = gate(first, permits=1)
    stream = first.stream(CAPITAL)
    next(stream)
    # The first engine stands still in the middle of a generation. The second, on the same weights, can load and count.
    second.load()
    assert second._loaded is first._loaded
    assert second.count_tokens("Paris") > 0
    other = make_engine(dtype="float32")
    assert other.chat(CAPITAL).text == ANSWER
    steps.open()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(second.chat, CAPITAL)
        assert joined(list(stream)) == ANSWER.removeprefix("The")
        assert running.result(timeout=60).text == ANSWER
