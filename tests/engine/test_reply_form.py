"""What response_format, tool_choice and tools ask for, and what is refused."""

from typing import Any

import pytest

from turboquant_local.engine import GenerationOptions, Tool
from turboquant_local.engine.options import check_options, merge_options
from turboquant_local.engine.reply_form import ReplyForm, offered_tools, reply_form
from turboquant_local.errors import GenerationOptionError

ADD, SEND = (Tool(name, "", {"type": "object", "properties": {}}) for name in ("add", "send"))
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("options", "tools", "form"),
    [
        ({}, [ADD], None),
        ({"tool_choice": "auto"}, [ADD], None),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, [ADD], None),
        ({"response_format": {"type": "text"}}, [ADD], None),
        ({"response_format": {"type": "json_object"}}, [], ReplyForm((), {"type": "object"}, True)),
        ({"response_format": JSON_SCHEMA}, [], ReplyForm((), SCHEMA, True)),
        ({"response_format": JSON_SCHEMA}, [ADD, SEND], ReplyForm((ADD, SEND), SCHEMA, True)),
        ({"response_format": JSON_SCHEMA, "tool_choice": "required"}, [ADD], ReplyForm((ADD,), None, True)),
        ({"tool_choice": "required"}, [ADD, SEND], ReplyForm((ADD, SEND), None, True)),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [ADD], ReplyForm((ADD,), None, False)),
        ({"tool_choice": "send"}, [ADD, SEND], ReplyForm((SEND,), None, False)),
    ],
)
def test_forms(options: dict[str, Any], tools: list[Tool], form: ReplyForm | None) -> None:
    chosen = GenerationOptions(**options)
    check_options(chosen)
    assert reply_form(chosen, tools) == form


def test_no_tools_are_offered_with_none() -> None:
    assert offered_tools(GenerationOptions(tool_choice="none"), [ADD]) == ()
    assert offered_tools(GenerationOptions(tool_choice="auto"), [ADD]) == (ADD,)
    form = reply_form(GenerationOptions(tool_choice="none", response_format=JSON_SCHEMA), ())
    assert form == ReplyForm((), SCHEMA, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"response_format": "json"}, "expected .*json_object"),
        ({"response_format": {"type": "yaml"}}, "expected .*json_object"),
        ({"response_format": {}}, "expected .*json_object"),
        ({"response_format": {"type": "json_object", "schema": {}}}, r"\['schema'\]: not known"),
        ({"response_format": {"type": "json_schema"}}, "expected the schema inside"),
        ({"response_format": {"type": "json_schema", "json_schema": SCHEMA}}, "expected the schema inside"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [{1, 2}]}}}},
            "not plain JSON values",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": float("nan")}}}},
            "not plain JSON values",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            r"\['schema'\], at '/not': a grammar cannot express this",
        ),
        ({"tool_choice": {"name": "add"}}, "expected 'auto', 'none', 'required' or the name of a tool"),
        ({"tool_choice": ""}, "expected 'auto'"),
        ({"parallel_tool_calls": "no"}, "expected True, False or None"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationOptionError, match=message):
        check_options(GenerationOptions(**options))


@pytest.mark.parametrize(
    ("choice", "tools", "message"),
    [
        ("required", [], "there are no tools"),
        ("add", [], "there are no tools"),
        ("ad", [ADD, SEND], r"the name of a tool \('add', 'send'\); did you mean 'add'\?"),
    ],
)
def test_choices_that_no_tool_can_answer(choice: str, tools: list[Tool], message: str) -> None:
    with pytest.raises(GenerationOptionError, match=message):
        reply_form(GenerationOptions(tool_choice=choice), tools)


def test_a_response_format_replaces_the_default_as_a_whole() -> None:
    default = GenerationOptions(response_format=JSON_SCHEMA, extra={"a": 1}, tool_choice="add")
    merged = merge_options(default, GenerationOptions(response_format={"type": "text"}, extra={"b": 2}))
    assert merged.response_format == {"type": "text"}
    assert merged.extra == {"a": 1, "b": 2}
    assert merged.tool_choice == "add"
    assert merge_options(default, None).response_format == JSON_SCHEMA
