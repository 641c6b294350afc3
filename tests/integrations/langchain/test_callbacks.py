"""The metrics handler: per run and in sum, whatever runs at the same time."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import BaseTool

from langchain_turboquant_local import (
    ChatTurboQuantLocal,
    RunMetrics,
    TotalMetrics,
    TurboQuantMetricsCallbackHandler,
    get_turboquant_callback,
)
from turboquant_local.errors import PromptError

FRANCE = "What is the capital of France?"

MakeModel = Callable[..., ChatTurboQuantLocal]


@pytest.fixture
def handler() -> TurboQuantMetricsCallbackHandler:
    return TurboQuantMetricsCallbackHandler()


def run(ttft: float = 1.0, **fields: Any) -> RunMetrics:
    figures: dict[str, Any] = {
        "run_id": None,
        "model": "m",
        "ttft": ttft,
        "total_time": 3.0,
        "tokens_per_second": 10.0,
        "input_tokens": 100,
        "output_tokens": 21,
        "cached_tokens": 50,
        "vram_bytes": 1000,
        "uncompressed_bytes": 3000,
        "engine": {},
    }
    return RunMetrics(**(figures | fields))


def test_sums_weigh_runs_by_what_they_did() -> None:
    slow = run(3.0, tokens_per_second=5.0, output_tokens=11, vram_bytes=500, uncompressed_bytes=500)
    single = run(2.0, tokens_per_second=0.0, output_tokens=1, vram_bytes=0, uncompressed_bytes=0)
    total = TotalMetrics.of([run(), slow, single])
    assert total == TotalMetrics(
        runs=3,
        ttft=2.0,
        total_time=9.0,
        tokens_per_second=30 / 4,  # 20 tokens in 2 s and 10 in 2 s
        input_tokens=300,
        output_tokens=33,
        cached_tokens=150,
        vram_bytes=1000,
        compression_ratio=3500 / 1500,
    )
    assert run().compression_ratio == 3
    assert single.compression_ratio == 1


def test_nothing_measured_is_zero(handler: TurboQuantMetricsCallbackHandler) -> None:
    assert handler.total == TotalMetrics(0, 0.0, 0.0, 0.0, 0, 0, 0, 0, 1.0)
    assert handler.runs == []


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream", "events"])
async def test_a_run_is_measured(
    model: ChatTurboQuantLocal, tiny_model: str, handler: TurboQuantMetricsCallbackHandler, way: str
) -> None:
    config: Any = {"callbacks": [handler]}
    if way == "invoke":
        model.invoke(FRANCE, config)
    elif way == "ainvoke":
        await model.ainvoke(FRANCE, config)
    elif way == "stream":
        list(model.stream(FRANCE, config))
    elif way == "astream":
        assert [chunk async for chunk in model.astream(FRANCE, config)]
    else:
        list(model.stream_events(FRANCE, config, version="v3"))
    (measured,) = handler.runs
    assert (measured.model, measured.input_tokens, measured.output_tokens) == (tiny_model, 15, 8)
    assert measured.engine["ttft"] <= measured.ttft < measured.total_time
    assert measured.tokens_per_second == measured.engine["tokens_per_second"] > 0
    assert measured.vram_bytes == measured.engine["vram_bytes"] == model.vram_bytes()
    assert measured.compression_ratio == measured.engine["compression_ratio"]
    assert not handler._open


@pytest.mark.parametrize(
    "reply",
    [
        "<think>\nHm.\n</think>\n\nYes.",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "A"}}\n</tool_call>',
    ],
)
def test_thinking_and_calls_count_as_first_token(
    model: ChatTurboQuantLocal,
    weather: BaseTool,
    script: Callable[..., Any],
    handler: TurboQuantMetricsCallbackHandler,
    reply: str,
) -> None:
    script(model, reply)
    stream = model.bind_tools([weather]).stream("Hi", config={"callbacks": [handler]})
    next(stream)
    shown = time.perf_counter()
    time.sleep(0.05)
    list(stream)
    (measured,) = handler.runs
    assert measured.total_time - measured.ttft >= 0.05 > time.perf_counter() - shown - measured.total_time


def test_concurrent_runs_are_kept_apart(make_model: MakeModel) -> None:
    one, two = make_model(), make_model(max_tokens=3)
    with get_turboquant_callback() as measured:
        threads = [threading.Thread(target=model.batch, args=([FRANCE, "Hello", FRANCE],)) for model in (one, two)]
        one.batch([FRANCE, "Hello", FRANCE])
        for thread in threads:
            thread.start()  # threads of one's own do not inherit the context, LangChain's do
        for thread in threads:
            thread.join()
    assert len(measured.runs) == 3
    assert measured.total.output_tokens == sum(found.output_tokens for found in measured.runs) == 8 + 8 + 11
    assert len({found.run_id for found in measured.runs}) == 3
    assert not measured._open


async def test_so_are_concurrent_tasks(model: ChatTurboQuantLocal) -> None:
    async def measure(question: str) -> int:
        with get_turboquant_callback() as measured:
            await model.ainvoke(question)
        return measured.total.output_tokens

    assert await asyncio.gather(measure(FRANCE), measure("Hello"), measure(FRANCE)) == [8, 11, 8]


def test_the_block_watches_chains_and_ends(model: ChatTurboQuantLocal) -> None:
    chain = ChatPromptTemplate.from_template("What is the capital of {country}?") | model | StrOutputParser()
    with get_turboquant_callback() as measured:
        chain.invoke({"country": "France"})
        with get_turboquant_callback("inner") as inner:
            chain.invoke({"country": "Italy"})
    chain.invoke({"country": "Spain"})
    assert (measured.total.runs, inner.total.runs) == (2, 1)
    assert str(measured).startswith("TurboQuantMetricsCallbackHandler(TotalMetrics(runs=2, ")


def test_the_block_ends_with_an_error_too(model: ChatTurboQuantLocal) -> None:
    with pytest.raises(PromptError), get_turboquant_callback() as measured:
        model.invoke([])
    model.invoke(FRANCE)
    assert measured.runs == []
    assert not measured._open


def test_a_closed_stream_is_forgotten(model: ChatTurboQuantLocal, handler: TurboQuantMetricsCallbackHandler) -> None:
    stream = model.stream(FRANCE, config={"callbacks": [handler]})
    next(stream)
    assert handler._open
    stream.close()
    assert not handler._open
    assert handler.runs == []


def test_other_models_and_cached_replies_pass_by(
    make_model: MakeModel, handler: TurboQuantMetricsCallbackHandler
) -> None:
    GenericFakeChatModel(messages=iter(["Hi"])).invoke("Hi", config={"callbacks": [handler]})
    model = make_model(cache=InMemoryCache())
    for _ in range(3):
        model.invoke(FRANCE, config={"callbacks": [handler]})
    assert len(handler.runs) == 1
    assert not handler._open
