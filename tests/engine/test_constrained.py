"""Constrained replies of a whole engine: forced calls, JSON, thinking, streaming, stopping, reuse and counting."""

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from turboquant_local.engine import (
    ChatEngine,
    Finished,
    GenerationOptions,
    Message,
    ReasoningDelta,
    TextDelta,
    Tool,
    ToolCallDelta,
)
from turboquant_local.errors import GenerationOptionError, ToolSchemaError

MakeEngine = Callable[..., ChatEngine]

CAPITAL = [Message("user", "What is the capital of France?")]
RAIN = [Message("user", "What is the weather in Paris?")]
WEATHER = Tool(
    "get_weather",
    "Get the current weather for a city",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
ADD = Tool(
    "add",
    "Add two numbers",
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]},
)
SCHEMA = {
    "type": "object",
    "properties": {"capital": {"type": "string", "maxLength": 20}, "inhabitants": {"enum": [1, 2]}},
    "required": ["capital", "inhabitants"],
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}


def options(**fields: Any) -> GenerationOptions:
    return GenerationOptions(**{"max_new_tokens": 120, **fields})


def test_json_by_a_schema(engine: ChatEngine) -> None:
    for fields in ({}, {"temperature": 1.2, "seed": 5}, {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "seed": 5}):
        reply = engine.chat(CAPITAL, options=options(response_format=FORMAT, **fields))
        assert reply.finish_reason == "stop"
        Draft202012Validator(SCHEMA).validate(json.loads(reply.text))
        # It ends with the text itself: no end token is asked for.
        assert reply.usage.completion_tokens == len(reply.token_ids) == engine.count_tokens(reply.text)


def test_a_json_object(engine: ChatEngine) -> None:
    reply = engine.chat(CAPITAL, options=options(response_format={"type": "json_object"}, max_new_tokens=60))
    assert reply.text.startswith("{")
    assert (reply.finish_reason == "stop") == isinstance(_json(reply.text), dict)


def test_a_text_that_is_cut_says_so(engine: ChatEngine) -> None:
    reply = engine.chat(CAPITAL, options=options(response_format=FORMAT, max_new_tokens=4))
    assert (reply.finish_reason, len(reply.token_ids)) == ("length", 4)
    assert _json(reply.text) is None
    free = engine.chat(CAPITAL, options=options(response_format={"type": "text"}))
    assert free.text == "The capital of France is Paris."


def test_forced_calls(engine: ChatEngine) -> None:
    for choice, names in (("required", {"get_weather", "add"}), ("add", {"add"}), ("get_weather", {"get_weather"})):
        for conversation in (CAPITAL, RAIN):
            reply = engine.chat(conversation, tools=[WEATHER, ADD], options=options(tool_choice=choice, seed=1))
            assert (reply.text, reply.finish_reason) == ("", "tool_calls")
            assert reply.tool_calls
            for call in reply.tool_calls:
                assert call.name in names
                tool = WEATHER if call.name == "get_weather" else ADD
                Draft202012Validator(tool.parameters).validate(call.arguments)
                assert call.id


def test_a_call_that_is_wanted_anyway_is_written_the_same(engine: ChatEngine) -> None:
    free = engine.chat(RAIN, tools=[WEATHER], options=options())
    forced = engine.chat(RAIN, tools=[WEATHER], options=options(tool_choice="required"))
    named = engine.chat(RAIN, tools=[WEATHER], options=options(tool_choice="get_weather"))
    assert free.tool_calls[0].arguments == forced.tool_calls[0].arguments == {"city": "Paris"}
    assert free.token_ids == forced.token_ids  # another call could follow, so that the end is the model's choice
    assert named.token_ids == free.token_ids[:-1]


def test_more_than_one_call(engine: ChatEngine) -> None:
    # A model that would rather not end: another call is all that can come instead.
    ends = {"sequence_bias": [[[2], -100.0]], "eos_token_id": 2}
    several = engine.chat(RAIN, tools=[ADD], options=options(tool_choice="required", extra=ends))
    assert len(several.tool_calls) > 1
    assert several.usage.completion_tokens == 120
    one = options(tool_choice="required", extra=ends, parallel_tool_calls=False)
    assert len(engine.chat(RAIN, tools=[ADD], options=one).tool_calls) == 1
    assert len(engine.chat(RAIN, tools=[ADD], options=options(tool_choice="add", extra=ends)).tool_calls) == 1


def test_no_call(engine: ChatEngine) -> None:
    assert engine.chat(RAIN, tools=[WEATHER], options=options()).tool_calls
    reply = engine.chat(RAIN, tools=[WEATHER], options=options(tool_choice="none"))
    bare = engine.chat(RAIN, options=options())
    assert (reply.token_ids, reply.usage.prompt_tokens) == (bare.token_ids, bare.usage.prompt_tokens)
    assert reply.tool_calls == ()


def test_a_call_or_a_text(engine: ChatEngine) -> None:
    call = engine.chat(RAIN, tools=[WEATHER], options=options(response_format=FORMAT))
    assert [(call.name, call.arguments) for call in call.tool_calls] == [("get_weather", {"city": "Paris"})]
    assert (call.text, call.finish_reason) == ("", "tool_calls")
    text = engine.chat(CAPITAL, tools=[WEATHER], options=options(response_format=FORMAT))
    assert (text.tool_calls, text.finish_reason) == ((), "stop")
    Draft202012Validator(SCHEMA).validate(json.loads(text.text))


def test_thinking_comes_first_and_is_free(engine: ChatEngine) -> None:
    for fields in ({"response_format": FORMAT}, {"tool_choice": "get_weather"}):
        reply = engine.chat(RAIN, tools=[WEATHER], options=options(enable_thinking=True, **fields))
        assert reply.reasoning == "The user asks: What is the weather in Paris?"
        assert 0 < reply.usage.reasoning_tokens < reply.usage.completion_tokens
        assert [(call.name, call.arguments) for call in reply.tool_calls] == [("get_weather", {"city": "Paris"})]


def test_events_come_live(engine: ChatEngine, gate: Callable[..., Any]) -> None:
    reference = engine.chat(CAPITAL, options=options(response_format=FORMAT))
    engine.reset()
    held = gate(engine, permits=6)
    stream = engine.stream(CAPITAL, options=options(response_format=FORMAT))
    first = next(stream)
    assert isinstance(first, TextDelta)
    assert held.steps <= 6 < len(reference.token_ids)
    held.open()
    *rest, last = stream
    assert isinstance(last, Finished)
    assert last.reply.text == reference.text == first.text + "".join(event.text for event in rest)  # type: ignore[union-attr]


async def test_events_of_a_forced_call(engine: ChatEngine) -> None:
    chosen = options(tool_choice="required", enable_thinking=True)
    events = [event async for event in engine.astream(RAIN, tools=[WEATHER], options=chosen)]
    kinds = [type(event) for event in events]
    assert kinds[0] is ReasoningDelta
    assert kinds[-2:] == [ToolCallDelta, Finished]
    assert TextDelta not in kinds


def test_stop_strings_and_cancelling(engine: ChatEngine, gate: Callable[..., Any]) -> None:
    whole = engine.chat(CAPITAL, options=options(response_format=FORMAT)).text
    reply = engine.chat(CAPITAL, options=options(response_format=FORMAT, stop=('", "inh',)))
    assert (reply.text, reply.finish_reason) == (whole[: whole.index('", "inh')], "stop")
    held, cancel = gate(engine, permits=8), threading.Event()
    stream = engine.stream(CAPITAL, options=options(response_format=FORMAT), cancel=cancel)
    next(stream)
    cancel.set()
    held.open()
    *_, last = stream
    assert isinstance(last, Finished)
    assert last.reply.finish_reason == "cancelled"
    assert whole.startswith(last.reply.text)


def test_seeds_and_reuse(make_engine: MakeEngine) -> None:
    engine = make_engine()
    chosen = options(response_format=FORMAT, temperature=1.5, seed=3)
    first, second = (engine.chat(CAPITAL, options=chosen) for _ in range(2))
    assert first.text == second.text
    other = engine.chat(CAPITAL, options=options(response_format=FORMAT, temperature=1.5, seed=4))
    assert other.text != first.text
    follow_up = [*CAPITAL, Message("assistant", other.text), Message("user", "What is the capital of Italy?")]
    warm = engine.chat(follow_up, options=options(response_format=FORMAT))
    assert warm.usage.cached_tokens > 0
    assert warm.token_ids == make_engine().chat(follow_up, options=options(response_format=FORMAT)).token_ids


def test_concurrent_requests_do_not_mix(make_engine: MakeEngine) -> None:
    engines = [make_engine(), make_engine()]
    want = engines[0].chat(CAPITAL, options=options(response_format=FORMAT)).text

    async def ask() -> list[str]:
        asked = [
            asyncio.to_thread(engine.chat, CAPITAL, options=options(response_format=FORMAT)) for engine in engines * 3
        ]
        return [reply.text for reply in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == [want] * 6


def test_a_parser_of_ones_own_is_not_asked_for_a_forced_call(make_engine: MakeEngine) -> None:
    engine = make_engine(tool_parser=lambda text: pytest.fail("the engine wrote the call in a format it knows"))
    reply = engine.chat(RAIN, tools=[WEATHER], options=options(tool_choice="required"))
    assert reply.tool_calls[0].arguments == {"city": "Paris"}


@pytest.mark.parametrize(
    ("tool", "fields", "message"),
    [
        (None, {"tool_choice": "required"}, "there are no tools"),
        (WEATHER, {"tool_choice": "get_wether"}, "did you mean 'get_weather'"),
        (
            Tool("pick", "", {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}),
            {"tool_choice": "pick"},
            "tool 'pick', parameters, at '/properties/x/uniqueItems': a grammar cannot express this",
        ),
        (
            None,
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            r"response_format\['json_schema'\]\['schema'\], at '/not': a grammar cannot express this",
        ),
    ],
)
def test_what_cannot_be_forced_is_refused_before_anything_is_generated(
    engine: ChatEngine, gate: Callable[..., Any], tool: Tool | None, fields: dict[str, Any], message: str
) -> None:
    held = gate(engine)
    with pytest.raises(GenerationOptionError, match=message):
        engine.chat(RAIN, tools=[tool] if tool else [], options=options(**fields))
    assert held.steps == 0


def test_a_broken_tool_is_still_a_broken_tool(engine: ChatEngine) -> None:
    with pytest.raises(ToolSchemaError):
        engine.chat(RAIN, tools=[Tool("x", "", {"type": "string"})], options=options(tool_choice="x"))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
