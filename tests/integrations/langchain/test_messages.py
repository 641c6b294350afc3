"""Conversation in LangChain's words, conversation in the engine's."""

from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.tool import tool_call

from langchain_turboquant_local.messages import to_engine_messages, with_calls_of_lone_results
from turboquant_local.engine import Message, ToolCall
from turboquant_local.errors import PromptError

CALL = tool_call(name="add", args={"a": 1}, id="1")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (SystemMessage("Be brief."), Message("system", "Be brief.")),
        (HumanMessage("Hi", name="Ann"), Message("user", "Hi", name="Ann")),
        (HumanMessage(["Read:", {"type": "text", "text": "this"}]), Message("user", "Read:\nthis")),
        (
            HumanMessage([{"type": "text-plain", "text": "A document.", "mime_type": "text/plain"}]),
            Message("user", "A document."),
        ),
        (ChatMessage("Hi", role="user"), Message("user", "Hi")),
        (ChatMessage("Be brief.", role="developer"), Message("system", "Be brief.")),
        (AIMessage("Hello"), Message("assistant", "Hello")),
        (
            AIMessage("42", additional_kwargs={"reasoning_content": "6 * 7"}),
            Message("assistant", "42", reasoning="6 * 7"),
        ),
        (
            AIMessage([{"type": "reasoning", "reasoning": "6 * 7"}, {"type": "text", "text": "42"}]),
            Message("assistant", "42", reasoning="6 * 7"),
        ),
        (
            AIMessage(
                [
                    {"type": "thinking", "thinking": "Add.", "signature": "x"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "So:"},
                    {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}},
                ],
                tool_calls=[CALL],
            ),
            Message("assistant", "So:", tool_calls=(ToolCall("add", {"a": 1}, "1"),), reasoning="Add."),
        ),
        (
            AIMessage([{"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}}]),
            Message("assistant", tool_calls=(ToolCall("add", {"a": 1}, "1"),)),
        ),
        (
            AIMessageChunk("", tool_call_chunks=[{"name": "add", "args": '{"a": 1}', "id": "1", "index": 0}]),
            Message("assistant", tool_calls=(ToolCall("add", {"a": 1}, "1"),)),
        ),
        (
            ToolMessage("2", tool_call_id="1", name="add"),
            Message("tool", "2", tool_call_id="1", name="add"),
        ),
        (
            ToolMessage([{"type": "text", "text": "no b"}], tool_call_id="1", status="error"),
            Message("tool", "Error: no b", tool_call_id="1"),
        ),
        (
            ToolMessage("Error: no b", tool_call_id="1", status="error"),
            Message("tool", "Error: no b", tool_call_id="1"),
        ),
    ],
)
def test_messages_are_converted(message: BaseMessage, expected: Message) -> None:
    assert to_engine_messages([message]) == [expected]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "url": "https://example.org/cat.png"},
        {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}},
        {"type": "audio", "base64": "AAAA", "mime_type": "audio/wav"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "base64": "AAAA", "mime_type": "application/pdf"},
        {"type": "document", "source": {"type": "base64", "data": "AAAA"}},
        {"type": "video", "base64": "AAAA", "mime_type": "video/mp4"},
    ],
)
@pytest.mark.parametrize("where", ["human", "tool", "ai"])
def test_what_a_text_model_cannot_read_is_refused_by_name(block: dict[str, Any], where: str) -> None:
    content: Any = [{"type": "text", "text": "Look:"}, block]
    message = {
        "human": HumanMessage(content),
        "tool": ToolMessage(content, tool_call_id="1"),
        "ai": AIMessage(content),
    }[where]
    with pytest.raises(PromptError, match=rf"messages\[1\] \({where}\), block 1: a block of type '{block['type']}'"):
        to_engine_messages([SystemMessage("Be brief."), message])


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (HumanMessage([{"type": "tool_result", "tool_use_id": "1"}]), "'tool_result'.*ToolMessage"),
        (HumanMessage([{"type": "thinking", "thinking": "Hm."}]), "'thinking'.*AIMessage"),
        (AIMessage([{"type": "server_tool_call", "name": "search", "args": {}, "id": "1"}]), "'server_tool_call'"),
        (ChatMessage("Hi", role="judge"), "role='judge'"),
        (FunctionMessage("2", name="add"), "FunctionMessage.*ToolMessage"),
        (RemoveMessage("1"), "RemoveMessage"),
    ],
)
def test_what_no_template_can_express_is_refused(message: BaseMessage, named: str) -> None:
    with pytest.raises(PromptError, match=named):
        to_engine_messages([message])


def test_a_lone_result_gets_a_call_for_counting() -> None:
    result = Message("tool", "2", tool_call_id="1", name="add")
    call = Message("assistant", tool_calls=(ToolCall("add", {}, "1"),))
    assert with_calls_of_lone_results([result, result]) == [call, result, result]
    assert with_calls_of_lone_results([call, result]) == [call, result]
