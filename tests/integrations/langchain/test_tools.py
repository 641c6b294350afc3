"""Tools in every form LangChain takes them, and every tool choice."""

from collections.abc import Callable
from typing import Any, TypedDict

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import BaseTool
from pydantic import BaseModel

from langchain_turboquant_local import ChatTurboQuantLocal
from langchain_turboquant_local.tools import to_engine_tool_choice, to_engine_tools
from turboquant_local.errors import GenerationOptionError, PromptError, ToolSchemaError

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def find(city: str) -> str:
    """Find a city."""
    return city


class Find(BaseModel):
    """Find a city."""

    city: str


class FindDict(TypedDict):
    """Find a city."""

    city: str


@pytest.mark.parametrize(
    ("tool", "name"),
    [
        (find, "find"),
        (Find, "Find"),
        (FindDict, "FindDict"),
        ({"name": "find", "description": "Find a city.", "parameters": PARAMETERS}, "find"),
        (
            {"type": "function", "function": {"name": "find", "description": "Find a city.", "parameters": PARAMETERS}},
            "find",
        ),
        ({"name": "find", "description": "Find a city.", "input_schema": PARAMETERS}, "find"),
        ({"title": "find", "description": "Find a city.", **PARAMETERS}, "find"),
    ],
)
def test_tools_are_converted(tool: Any, name: str) -> None:
    (converted,) = to_engine_tools([tool])
    assert (converted.name, converted.description) == (name, "Find a city.")
    assert converted.parameters["properties"]["city"]["type"] == "string"
    assert converted.parameters["required"] == ["city"]


def test_a_tool_without_arguments_or_words() -> None:
    (converted,) = to_engine_tools([{"type": "function", "function": {"name": "now"}}])
    assert converted.description == ""
    assert converted.parameters == {"type": "object", "properties": {}}


def test_strict_closes_the_schema() -> None:
    (converted,) = to_engine_tools([find], strict=True)
    assert converted.parameters["additionalProperties"] is False


def test_a_tool_that_runs_elsewhere_is_refused(model: ChatTurboQuantLocal) -> None:
    with pytest.raises(ToolSchemaError, match=r"tools\[0\]: 'web_search'"):
        model.bind_tools([{"type": "web_search"}])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, None),
        ("auto", "auto"),
        ("none", "none"),
        ("any", "required"),
        ("required", "required"),
        (True, "required"),
        ("find", "find"),
        ({"type": "function", "function": {"name": "find"}}, "find"),
    ],
)
def test_tool_choices_are_converted(choice: Any, expected: str | None) -> None:
    assert to_engine_tool_choice(choice, ["find"]) == expected


@pytest.mark.parametrize("choice", ["fined", False, 1, {"type": "any"}, {"type": "function", "function": {}}])
def test_other_tool_choices_are_refused(choice: Any) -> None:
    with pytest.raises(GenerationOptionError, match=r"tool_choice=.*\(find\)"):
        to_engine_tool_choice(choice, ["find"])


def test_a_forced_call_needs_a_tool(model: ChatTurboQuantLocal) -> None:
    with pytest.raises(GenerationOptionError, match="no tool is bound"):
        model.bind_tools([], tool_choice="any")


@pytest.mark.parametrize("choice", ["any", "required", True, "get_weather"])
def test_a_forced_call_comes_whatever_was_asked(model: ChatTurboQuantLocal, weather: BaseTool, choice: Any) -> None:
    answer = model.bind_tools([weather, find], tool_choice=choice).invoke("Hello!")
    assert answer.tool_calls
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    if choice == "get_weather":
        assert [call["name"] for call in answer.tool_calls] == ["get_weather"]


def test_no_call_is_possible_with_none(model: ChatTurboQuantLocal, weather: BaseTool) -> None:
    question = "What is the weather in Paris?"
    assert model.bind_tools([weather], tool_choice="auto").invoke(question).tool_calls
    assert not model.bind_tools([weather], tool_choice="none").invoke(question).tool_calls


@pytest.mark.parametrize("parallel", [True, False])
def test_one_call_or_several(
    model: ChatTurboQuantLocal, weather: BaseTool, script: Callable[..., Any], parallel: bool
) -> None:
    calls = [
        f'<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>' for city in "AB"
    ]
    script(model, "\n".join(calls))
    bound = model.bind_tools([weather], tool_choice="any", parallel_tool_calls=parallel)
    full = None
    for chunk in bound.stream("Hello!"):
        full = chunk if full is None else full + chunk
    assert full is not None
    assert [call["args"]["city"] for call in full.tool_calls] == ["A", "B"][: 2 if parallel else 1]
    assert len({call["id"] for call in full.tool_calls}) == len(full.tool_calls)


def test_a_result_without_its_call_is_refused(model: ChatTurboQuantLocal) -> None:
    with pytest.raises(PromptError, match=r"messages\[1\].tool_call_id='1': no earlier assistant message"):
        model.invoke([HumanMessage("Hi"), ToolMessage("2", tool_call_id="1")])
