import re

import pytest
from haystack.dataclasses import (
    ChatMessage,
    ChatRole,
    FileContent,
    ImageContent,
    ReasoningContent,
    TextContent,
    ToolCall,
    ToolCallResult,
)
from haystack.tools import Tool

from haystack_integrations.components.generators.turboquant_local.chat.messages import (
    to_engine_messages,
    to_engine_parser,
    to_engine_tools,
)
from turboquant_local.engine import types as engine
from turboquant_local.errors import PromptError

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="


def test_plain_turns_keep_role_text_and_name() -> None:
    messages = [
        ChatMessage.from_system("Be brief."),
        ChatMessage.from_user("Hello!", name="ada"),
        ChatMessage.from_assistant("Hi."),
    ]

    assert to_engine_messages(messages) == [
        engine.Message("system", "Be brief."),
        engine.Message("user", "Hello!", name="ada"),
        engine.Message("assistant", "Hi."),
    ]


def test_parts_of_text_stay_apart() -> None:
    message = ChatMessage.from_user(content_parts=["first", TextContent("second")])

    assert to_engine_messages([message]) == [engine.Message("user", "first\nsecond")]


def test_a_turn_with_calls_keeps_text_reasoning_and_nested_arguments() -> None:
    calls = [ToolCall("weather", {"where": {"city": "Paris"}}, id="a"), ToolCall("time", {})]
    message = ChatMessage.from_assistant("Let me look.", tool_calls=calls, reasoning=ReasoningContent("Two calls."))

    assert to_engine_messages([message]) == [
        engine.Message(
            "assistant",
            "Let me look.",
            tool_calls=(
                engine.ToolCall("weather", {"where": {"city": "Paris"}}, "a"),
                engine.ToolCall("time", {}, ""),
            ),
            reasoning="Two calls.",
        )
    ]


def test_an_empty_assistant_turn_is_allowed() -> None:
    assert to_engine_messages([ChatMessage.from_assistant("")]) == [engine.Message("assistant", "")]
    assert to_engine_messages([ChatMessage(ChatRole.ASSISTANT, [])]) == [engine.Message("assistant", "")]


def test_every_tool_result_becomes_a_message_of_its_own() -> None:
    first, second = ToolCall("weather", {"city": "Paris"}, id="a"), ToolCall("weather", {"city": "Rome"})
    message = ChatMessage(
        ChatRole.TOOL,
        [
            ToolCallResult("sunny", first, error=False),
            ToolCallResult([TextContent("rain"), TextContent("wind")], second, error=False),
        ],
    )

    assert to_engine_messages([message]) == [
        engine.Message("tool", "sunny", tool_call_id="a", name="weather"),
        engine.Message("tool", "rain\nwind", name="weather"),
    ]


@pytest.mark.parametrize(
    ("result", "expected"),
    [("no such city", "Error: no such city"), ("Error: no such city", "Error: no such city")],
)
def test_a_failed_tool_says_so(result: str, expected: str) -> None:
    message = ChatMessage.from_tool(result, origin=ToolCall("weather", {}), error=True)

    assert to_engine_messages([message])[0].content == expected


@pytest.mark.parametrize(
    ("part", "named"),
    [
        (ImageContent(PIXEL, mime_type="image/png", validation=False), "ImageContent (image/png)"),
        (FileContent("JVBERi0=", mime_type="application/pdf", validation=False), "FileContent (application/pdf)"),
    ],
)
def test_media_are_refused_by_name_and_place(part: ImageContent | FileContent, named: str) -> None:
    asked = ChatMessage.from_user(content_parts=["What is this?", part])
    returned = ChatMessage.from_tool([part], origin=ToolCall("camera", {}))

    with pytest.raises(PromptError, match=re.escape(f"messages[1] (user): holds {named}")):
        to_engine_messages([ChatMessage.from_user("Hi"), asked])
    with pytest.raises(PromptError, match=re.escape(f"messages[0] (tool), result of tool 'camera': holds {named}")):
        to_engine_messages([returned])


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (ChatMessage(ChatRole.USER, []), "the message is empty"),
        (ChatMessage(ChatRole.TOOL, [TextContent("42")]), "expected a ToolCallResult"),
        (
            ChatMessage(ChatRole.TOOL, [TextContent("!"), ToolCallResult("42", ToolCall("sum", {}), error=False)]),
            "put the other content in its own message",
        ),
    ],
)
def test_messages_that_no_template_can_express_are_refused(message: ChatMessage, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        to_engine_messages([message])


def test_tools_keep_their_schema() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = Tool("weather", "The weather in a city.", schema, function=lambda city: city)

    assert to_engine_tools([tool]) == (engine.Tool("weather", "The weather in a city.", schema),)


def test_a_parser_of_haystack_calls_serves_the_engine() -> None:
    parse = to_engine_parser(lambda text: [ToolCall(text, {"n": 1}, id="x")] if text else None)

    assert list(parse("add")) == [engine.ToolCall("add", {"n": 1}, "x")]
    assert list(parse("")) == []
    with pytest.raises(TypeError, match=r"tool_parsing_function returned \['call'\]: expected a list of ToolCall"):
        to_engine_parser(lambda text: [text])("call")  # type: ignore[list-item]
