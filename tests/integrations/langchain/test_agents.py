"""Agents and graphs over the chat model.

The embedded model calls a tool and answers from its result by itself. Where a schema is asked for as well, its replies
are scripted: it was not trained on tools and a schema together.
"""

from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import BaseTool
from pydantic import BaseModel

from langchain_turboquant_local import ChatTurboQuantLocal, get_turboquant_callback

WEATHER = {"messages": [{"role": "user", "content": "What is the weather in Paris?"}]}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
REPORT = '{"city": "Paris", "degrees": 21}'
REPORT_CALL = f'<tool_call>\n{{"name": "Report", "arguments": {REPORT}}}\n</tool_call>'


class Report(BaseModel):
    """A weather report."""

    city: str
    degrees: int


@pytest.mark.parametrize("is_async", [False, True])
async def test_an_agent_calls_a_tool_and_answers(model: ChatTurboQuantLocal, weather: BaseTool, is_async: bool) -> None:
    agent = create_agent(model, [weather])
    with get_turboquant_callback() as measured:
        state = await agent.ainvoke(WEATHER) if is_async else agent.invoke(WEATHER)
    _, call, result, answer = state["messages"]
    assert call.tool_calls[0]["args"] == {"city": "Paris"}
    assert "21" in result.content
    assert "21" in answer.text
    assert "sunny" in answer.text
    assert measured.total.runs == 2
    # The second step begins like the first, which is not computed again.
    assert measured.runs[1].cached_tokens > measured.runs[0].input_tokens


@pytest.mark.parametrize(
    ("response_format", "last"),
    [
        (ToolStrategy(Report), REPORT_CALL),
        (ProviderStrategy(Report), REPORT),
        (Report, REPORT),  # the profile says that the model can do without a tool
    ],
    ids=["tool", "provider", "auto"],
)
def test_an_agent_answers_with_an_object(
    model: ChatTurboQuantLocal, weather: BaseTool, script: Callable[..., Any], response_format: Any, last: str
) -> None:
    replies = script(model, CALL, last)
    state = create_agent(model, [weather], response_format=response_format).invoke(WEATHER)
    assert state["structured_response"] == Report(city="Paris", degrees=21)
    assert any("21" in message.content for message in state["messages"] if isinstance(message, ToolMessage))
    assert replies.is_done


def test_an_agent_without_tools_answers_with_an_object(model: ChatTurboQuantLocal) -> None:
    text = "city: Paris, degrees: 21\n\nAnswer with a JSON object with the keys city, degrees."
    state = create_agent(model, response_format=Report).invoke({"messages": [HumanMessage(text)]})
    assert state["structured_response"] == Report(city="Paris", degrees=21)


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_graph_streams_messages_as_they_come(
    model: ChatTurboQuantLocal, weather: BaseTool, gate: Callable[..., Any], is_async: bool
) -> None:
    agent = create_agent(model, [weather])
    steps = gate(model)
    chunks: list[Any] = []
    counts: list[int] = []
    if is_async:
        async for message, _ in agent.astream(WEATHER, stream_mode="messages"):
            chunks.append(message)
            counts.append(steps.steps)
    else:
        for message, _ in agent.stream(WEATHER, stream_mode="messages"):
            chunks.append(message)
            counts.append(steps.steps)
    at_result = [isinstance(chunk, ToolMessage) for chunk in chunks].index(True)
    before, after = chunks[:at_result], chunks[at_result + 1 :]
    assert [chunk["name"] for message in before for chunk in message.tool_call_chunks] == ["get_weather"]
    assert all(isinstance(message, AIMessageChunk) for message in (*before, *after))
    assert len({message.id for message in after}) == 1
    texts = [message.text for message in after]
    assert "21" in "".join(texts)
    assert len([text for text in texts if text]) > 3
    # Each text is seen while the next ones are still to come.
    assert counts[at_result + 1] < counts[-1]


def test_a_graph_shows_a_reply_once_without_streaming(make_model: Callable[..., ChatTurboQuantLocal]) -> None:
    agent = create_agent(make_model(disable_streaming=True))
    question = {"messages": [HumanMessage("What is the capital of France?")]}
    seen = [message for message, _ in agent.stream(question, stream_mode="messages")]
    assert "".join(message.text for message in seen) == "The capital of France is Paris."


def test_the_profile_decides_when_to_summarise(model: ChatTurboQuantLocal, script: Callable[..., Any]) -> None:
    middleware = SummarizationMiddleware(model, trigger=("fraction", 0.01), keep=("messages", 1))
    agent = create_agent(model, middleware=[middleware])
    conversation = [HumanMessage("My dog is called Bruno. " * 8), AIMessage("Yes."), HumanMessage("Hello")]
    script(model, "The dog is called Bruno.", "Hello!")
    messages = agent.invoke({"messages": conversation})["messages"]
    assert "The dog is called Bruno." in messages[0].text
    assert len(messages) == 3
