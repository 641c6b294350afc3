"""Each format of tool calls, and that a reader never takes back what it said."""

from __future__ import annotations

from typing import Any

import pytest

from turboquant_local.engine.tool_formats import (
    HERMES_MARK,
    LLAMA_MARK,
    MISTRAL_MARK,
    NO_CALL,
    PENDING,
    Calls,
    Reading,
    read_calls,
)
from turboquant_local.engine.types import Tool

TOOL = Tool(
    "weather",
    "",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "metric": {"type": "boolean"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "options": {"type": ["object", "null"]},
            "anything": True,
        },
    },
)
PARIS: tuple[str, Any] = ("weather", {"city": "Paris"})
BARE: tuple[str, Any] = ("weather", {})


def readings(mark: str, body: str) -> list[Reading]:
    """What the reader answers to every beginning of the text, and to all of it at the end."""
    growing = [read_calls(mark, body[:size], [TOOL], final=False) for size in range(len(body) + 1)]
    decided = [reading for reading in growing if reading is not PENDING]
    assert all(reading == decided[0] for reading in decided), "an answer changed when more text came"
    final = read_calls(mark, body, [TOOL], final=True)
    assert final is not PENDING
    assert not decided or decided[0] == final
    return [*growing, final]


def calls(mark: str, body: str) -> list[tuple[str, Any]]:
    final = readings(mark, body)[-1]
    assert isinstance(final, Calls)
    return [(call.name, call.arguments) for call in final.calls]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>', PARIS),
        ('{"arguments":{"city":"Paris"},"name":" weather "}</tool_call>', PARIS),
        ('{"name": "weather", "parameters": {"city": "Paris"}}</tool_call>', PARIS),
        ('{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', PARIS),
        ('{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}</tool_call>', PARIS),
        ('{"name": "weather"}</tool_call>', BARE),
        ('{"name": "weather", "arguments": {}}</tool_call>', BARE),
        ('{"name": "weather", "arguments": null}</tool_call>', BARE),
        ('{"name": "weather", "arguments": ""}</tool_call>', BARE),
        (
            '{"name": "x", "arguments": {"a": {"b": [{"c": "}"}, []]}}}</tool_call>',
            ("x", {"a": {"b": [{"c": "}"}, []]}}),
        ),
        ('{"name": "x", "arguments": {"s": "</tool_call> {\\"["}}</tool_call>', ("x", {"s": '</tool_call> {"['})),
        ('{"name": "x", "arguments": {"s": "line\nline"}}</tool_call>', ("x", {"s": "line\nline"})),
        (
            '{"name": "x", "arguments": {"u": "é\\u2603", "n": null, "f": -1.5e3, "t": true}}</tool_call>',
            ("x", {"u": "é☃", "n": None, "f": -1500.0, "t": True}),
        ),
    ],
)
def test_hermes(body: str, expected: tuple[str, Any]) -> None:
    assert calls(HERMES_MARK, body) == [expected]


def test_hermes_without_its_closing_mark() -> None:
    assert calls(HERMES_MARK, '{"name": "weather"}\n') == [BARE]
    assert calls(HERMES_MARK, '{"name": "weather"}</tool') == [BARE]
    followed = readings(HERMES_MARK, '{"name": "weather"}\n<tool_call>{"name": "b"}')[-1]
    assert isinstance(followed, Calls)
    assert (followed.calls[0].name, followed.end) == ("weather", 20)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>", PARIS),
        ("<function=weather></function></tool_call>", BARE),
        (
            "\n<function=weather><parameter=days>3</parameter><parameter=metric>True</parameter></function></tool_call>",
            ("weather", {"days": 3, "metric": True}),
        ),
        (
            '<function=weather><parameter=options>\n{"a": [1]}\n</parameter></function></tool_call>',
            ("weather", {"options": {"a": [1]}}),
        ),
        (
            "<function=weather><parameter=options>null</parameter><parameter=note>null</parameter></function></tool_call>",
            ("weather", {"options": None, "note": None}),
        ),
        (
            "<function=weather><parameter=note>5</parameter><parameter=anything>6</parameter></function></tool_call>",
            ("weather", {"note": "5", "anything": "6"}),
        ),
        ("<function=weather><parameter=days>many</parameter></function></tool_call>", ("weather", {"days": "many"})),
        (
            "<function=write><parameter=code>\n\n  <b></parameter>'</function>'\n\n</parameter></function></tool_call>",
            ("write", {"code": "\n  <b></parameter>'</function>'\n"}),
        ),
    ],
)
def test_qwen3_coder(body: str, expected: tuple[str, Any]) -> None:
    assert calls(HERMES_MARK, body) == [expected]


@pytest.mark.parametrize("mark", [LLAMA_MARK, ""])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"name": "weather", "parameters": {"city": "Paris"}}', [PARIS]),
        (' \n{"type": "function", "name": "weather", "parameters": {"city": "Paris"}}\n', [PARIS]),
        ('{"name": "weather"}', [BARE]),
        ('{"name": "weather", "parameters": {}}; {"name": "x", "arguments": {}};', [BARE, ("x", {})]),
    ],
)
def test_llama(mark: str, body: str, expected: list[tuple[str, Any]]) -> None:
    assert calls(mark, body) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (' [{"name": "weather", "arguments": {"city": "Paris"}}]', [PARIS]),
        ('[{"name": "weather", "arguments": {}}, {"name": "x", "arguments": {"y": [1]}}]', [BARE, ("x", {"y": [1]})]),
        ('{"name": "weather", "arguments": {"city": "Paris"}}', [PARIS]),
        ('weather[ARGS]{"city": "Paris"}', [PARIS]),
        ('weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Paris"}', [PARIS]),
        (' weather [CALL_ID] a1B2c3D4e [ARGS] {"city": "Paris"}', [PARIS]),
        ("weather{}", [BARE]),
        ("mcp.server/tool-1[ARGS]{}", [("mcp.server/tool-1", {})]),
    ],
)
def test_mistral(body: str, expected: list[tuple[str, Any]]) -> None:
    assert calls(MISTRAL_MARK, body) == expected


def test_ids_that_the_model_gives() -> None:
    for mark, body in (
        (MISTRAL_MARK, "weather[CALL_ID]a1B2c3D4e[ARGS]{}"),
        (MISTRAL_MARK, '[{"name": "weather", "arguments": {}, "id": "a1B2c3D4e"}]'),
        (HERMES_MARK, '{"name": "weather", "id": "a1B2c3D4e"}</tool_call>'),
    ):
        final = readings(mark, body)[-1]
        assert isinstance(final, Calls)
        assert final.calls[0].id == "a1B2c3D4e"


@pytest.mark.parametrize(
    ("mark", "body"),
    [
        (HERMES_MARK, ""),
        (HERMES_MARK, " before the call"),
        (HERMES_MARK, '{"name": "a", "arguments": {"city": "Par'),
        (HERMES_MARK, '{"name": "a"}}</tool_call>'),
        (HERMES_MARK, '{"name": "a"} and more</tool_call>'),
        (HERMES_MARK, '{"name": "a", "arguments": [1]}</tool_call>'),
        (HERMES_MARK, '{"name": "a", "arguments": "no json"}</tool_call>'),
        (HERMES_MARK, '{"name": "a", "arguments": "{} {}"}</tool_call>'),
        (HERMES_MARK, '{"name": " ", "arguments": {}}</tool_call>'),
        (HERMES_MARK, '{"name": 3, "arguments": {}}</tool_call>'),
        (HERMES_MARK, '{"arguments": {}}</tool_call>'),
        (HERMES_MARK, '{"name": "a", "arguments": {"x": NaN}}</tool_call>'),
        (HERMES_MARK, '{"name": "a", "arguments": {"x": "\\ud83d"}}</tool_call>'),
        (HERMES_MARK, "{'name': 'a'}</tool_call>"),
        (HERMES_MARK, "<function=a><parameter=x>1</function></tool_call>"),
        (HERMES_MARK, "<function=a>text</function></tool_call>"),
        (HERMES_MARK, "<function=></function></tool_call>"),
        (HERMES_MARK, "<function=a><parameter=x>1</parameter>"),
        (HERMES_MARK, "<func"),
        (LLAMA_MARK, ""),
        (LLAMA_MARK, 'print("hi")'),
        ("", '{"name": "weather", "parameters": {"city": "Par'),
        ("", '{"name": "weather", "parameters": {}} is how it is called.'),
        ("", '{"name": "weather", "parameters": {}}; no'),
        ("", '{"name": "weather", "parameters": {}}; {"x": 1}'),
        ("", '{"name": "weather"}{"name": "weather"}'),
        ("", '{"name": "weather"},{"name": "weather"}'),
        ("", '{"name": "Bob", "parameters": {}, "age": 3}'),
        ("", '{"name": "Bob"}'),
        ("", '{"answer": {"name": "weather"}}'),
        ("", "{}"),
        ("", "{ python }"),
        (MISTRAL_MARK, ""),
        (MISTRAL_MARK, " is a mark {}"),
        (MISTRAL_MARK, " [1] and [2]"),
        (MISTRAL_MARK, '[{"name": "a"}, {"name": 3}]'),
        (MISTRAL_MARK, '[{"name": "a"}'),
        (MISTRAL_MARK, "[]"),
        (MISTRAL_MARK, "name[ARGS]"),
        (MISTRAL_MARK, "name[ARGS]{"),
        (MISTRAL_MARK, "name[OTHER]{}"),
        (MISTRAL_MARK, "name[CALL_ID][ARGS]{}"),
    ],
)
def test_no_call(mark: str, body: str) -> None:
    assert readings(mark, body)[-1] is NO_CALL


def test_nesting_too_deep_for_the_json_reader_is_no_call() -> None:
    body = '{"name": "a", "arguments": ' + '{"a":' * 100_000 + "1" + "}" * 100_001 + "</tool_call>"
    assert read_calls(HERMES_MARK, body, [TOOL], final=True) is NO_CALL
