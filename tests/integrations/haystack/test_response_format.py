"""`response_format` and `tool_choice` in the component, as dicts and as a pydantic model, and in YAML."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from haystack import Pipeline
from haystack.dataclasses import ChatMessage, StreamingChunk
from haystack.tools import Tool
from pydantic import BaseModel, Field

from haystack_integrations.components.generators.turboquant_local import TurboQuantLocalChatGenerator
from turboquant_local.errors import GenerationOptionError

CAPITAL = "What is the capital of France?"
RAIN = "What is the weather in Paris?"


class City(BaseModel):
    """A place."""

    name: str = Field(max_length=20)
    size: Literal["small", "large"]
    mayor: str | None = Field(default=None, max_length=20)


SCHEMA = {"type": "json_schema", "json_schema": {"name": "City", "schema": City.model_json_schema()}}


@pytest.fixture
def make(tiny_model: str, weights: None) -> Any:
    def make(**fields: Any) -> TurboQuantLocalChatGenerator:
        return TurboQuantLocalChatGenerator(model=tiny_model, **fields)

    return make


@pytest.mark.parametrize("response_format", [City, SCHEMA], ids=["model", "dict"])
def test_a_reply_by_a_schema(make: Any, response_format: Any) -> None:
    generator = make(generation_kwargs={"response_format": response_format, "max_new_tokens": 100})
    reply = generator.run(CAPITAL)["replies"][0]
    assert City.model_validate_json(reply.text).size in ("small", "large")
    assert reply.meta["finish_reason"] == "stop"


def test_a_run_has_the_last_word(generator: TurboQuantLocalChatGenerator) -> None:
    assert generator.run(CAPITAL)["replies"][0].text == "The capital of France is Paris."
    held = generator.run(CAPITAL, generation_kwargs={"response_format": City, "max_new_tokens": 100})["replies"][0]
    assert City.model_validate_json(held.text)
    assert generator.generation_kwargs == {"max_new_tokens": 48}


def test_a_default_can_be_taken_back(make: Any) -> None:
    generator = make(generation_kwargs={"response_format": City})
    free = generator.run(CAPITAL, generation_kwargs={"response_format": {"type": "text"}})["replies"][0]
    assert free.text == "The capital of France is Paris."


def test_streaming(make: Any) -> None:
    generator = make(generation_kwargs={"response_format": City, "max_new_tokens": 100})
    chunks: list[StreamingChunk] = []
    reply = generator.run(CAPITAL, streaming_callback=chunks.append)["replies"][0]
    assert len(chunks) > 5
    assert "".join(chunk.content for chunk in chunks) == reply.text
    assert City.model_validate_json(reply.text)


async def test_async(make: Any) -> None:
    generator = make(generation_kwargs={"response_format": {"type": "json_object"}, "max_new_tokens": 8})
    reply = (await generator.run_async(CAPITAL))["replies"][0]
    assert reply.text.startswith("{")


@pytest.mark.parametrize(
    "tool_choice", ["required", "get_weather", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_forced_call(make: Any, weather: Tool, tool_choice: Any) -> None:
    generator = make(tools=[weather], generation_kwargs={"tool_choice": tool_choice, "parallel_tool_calls": False})
    reply = generator.run(CAPITAL)["replies"][0]
    assert [call.tool_name for call in reply.tool_calls] == ["get_weather"]
    assert isinstance(reply.tool_calls[0].arguments["city"], str)
    assert reply.meta["finish_reason"] == "tool_calls"


def test_no_call(make: Any, weather: Tool) -> None:
    generator = make(tools=[weather])
    assert generator.run(RAIN)["replies"][0].tool_calls
    assert not generator.run(RAIN, generation_kwargs={"tool_choice": "none"})["replies"][0].tool_calls


def test_a_call_or_a_text(make: Any, weather: Tool) -> None:
    generator = make(tools=[weather], generation_kwargs={"response_format": City, "max_new_tokens": 100})
    assert generator.run(RAIN)["replies"][0].tool_calls[0].arguments == {"city": "Paris"}
    text = generator.run([ChatMessage.from_user(CAPITAL)])["replies"][0]
    assert not text.tool_calls
    assert City.model_validate_json(text.text)


def test_yaml(make: Any, tmp_path: Path) -> None:
    generator = make(generation_kwargs={"response_format": City, "tool_choice": "auto", "max_new_tokens": 100})
    pipeline = Pipeline()
    pipeline.add_component("llm", generator)
    text = pipeline.dumps()
    again = Pipeline.loads(text)
    loaded = again.get_component("llm")
    assert loaded.generation_kwargs == {"response_format": SCHEMA, "tool_choice": "auto", "max_new_tokens": 100}
    assert generator.generation_kwargs["response_format"] is City  # only what is written out is plain
    assert again.dumps() == text
    want = generator.run(CAPITAL)["replies"][0].text
    assert json.loads(again.run({"llm": {"messages": CAPITAL}})["llm"]["replies"][0].text) == json.loads(want)


@pytest.mark.parametrize(
    ("generation_kwargs", "message"),
    [
        ({"response_format": {"type": "xml"}}, "json_object"),
        ({"response_format": dict}, "json_object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "at '/not'"),
        ({"tool_choice": {"type": "function"}}, "the name of a tool"),
    ],
)
def test_nonsense_is_refused_by_the_constructor(generation_kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationOptionError, match=message):
        TurboQuantLocalChatGenerator(generation_kwargs=generation_kwargs)


def test_a_choice_without_tools(generator: TurboQuantLocalChatGenerator) -> None:
    with pytest.raises(GenerationOptionError, match="there are no tools"):
        generator.run(CAPITAL, generation_kwargs={"tool_choice": "required"})
