from typing import Any

import pytest
from haystack.components.agents import Agent
from haystack.dataclasses import ChatMessage, StreamingChunk
from haystack.tools import Tool, Toolset

from haystack_integrations.components.generators.turboquant_local import MetricsCallback, TurboQuantLocalChatGenerator

WEATHER_QUESTION = [ChatMessage.from_user("What is the weather in Paris?")]
WEATHER_ANSWER = "The temperature is 21 and condition is sunny."


def test_a_call_is_streamed_as_one_chunk(generator: TurboQuantLocalChatGenerator, weather: Tool) -> None:
    chunks: list[StreamingChunk] = []

    reply = generator.run(WEATHER_QUESTION, tools=[weather], streaming_callback=chunks.append)["replies"][0]

    assert reply.text is None
    assert [(call.tool_name, call.arguments) for call in reply.tool_calls] == [("get_weather", {"city": "Paris"})]
    assert reply.tool_calls[0].id
    assert reply.meta["finish_reason"] == "tool_calls"
    assert [bool(chunk.tool_calls) for chunk in chunks] == [True, False]


def test_tools_of_the_run_win_and_none_can_be_offered(
    generator: TurboQuantLocalChatGenerator, tiny_model: str, weather: Tool
) -> None:
    equipped = TurboQuantLocalChatGenerator(model=tiny_model, tools=Toolset([weather]))
    time = Tool("get_time", "Get the current time in a city.", weather.parameters, function=weather.function)

    assert equipped.run(WEATHER_QUESTION)["replies"][0].tool_call is not None
    called = equipped.run([ChatMessage.from_user("What time is it in Rome?")], tools=[time])["replies"][0].tool_call
    assert called is not None
    assert (called.tool_name, called.arguments) == ("get_time", {"city": "Rome"})
    assert equipped.run(WEATHER_QUESTION, tools=[])["replies"][0].tool_call is None
    equipped.close()


class LazyToolset(Toolset):
    """Has its tools only once it was warmed up, as Haystack's toolsets of remote servers."""

    def __init__(self, tool: Tool) -> None:
        self._tool = tool
        super().__init__([])

    def warm_up(self) -> None:
        self.tools = [self._tool]


async def test_a_toolset_that_loads_its_tools_is_there_from_the_first_run(
    generator: TurboQuantLocalChatGenerator, tiny_model: str, weather: Tool
) -> None:
    for run_async in (False, True):
        equipped = TurboQuantLocalChatGenerator(model=tiny_model, tools=LazyToolset(weather))
        result = await equipped.run_async(WEATHER_QUESTION) if run_async else equipped.run(WEATHER_QUESTION)
        assert result["replies"][0].tool_call is not None
        equipped.close()
        tools = LazyToolset(weather)
        result = (
            await generator.run_async(WEATHER_QUESTION, tools=tools)
            if run_async
            else generator.run(WEATHER_QUESTION, tools=tools)
        )
        assert result["replies"][0].tool_call is not None


def test_what_is_no_tool_is_refused(generator: TurboQuantLocalChatGenerator, weather: Tool) -> None:
    with pytest.raises(TypeError, match=r"tools must be list\[Union\[Tool, Toolset\]\], Toolset, or None"):
        generator.run(WEATHER_QUESTION, tools=weather)  # type: ignore[arg-type]


def test_two_tools_of_one_name_are_refused(generator: TurboQuantLocalChatGenerator, weather: Tool) -> None:
    with pytest.raises(ValueError, match="Duplicate tool names"):
        TurboQuantLocalChatGenerator(tools=[weather, weather])
    with pytest.raises(ValueError, match="Duplicate tool names"):
        generator.run(WEATHER_QUESTION, tools=[weather, weather])


def _check(result: dict[str, Any], metrics: MetricsCallback) -> None:
    assert result["last_message"].text == WEATHER_ANSWER
    assert result["step_count"] == 2
    assert result["tool_call_counts"] == {"get_weather": 1}
    assert result["exit_reason"] == "text"
    steps = [message.meta["usage"] for message in result["messages"] if message.meta]
    assert result["token_usage"]["total_tokens"] == sum(step["total_tokens"] for step in steps)
    # The second step computes nothing that the first one did.
    assert steps[1]["prompt_tokens_details"]["cached_tokens"] >= steps[0]["prompt_tokens"]
    assert [reply.usage for reply in metrics.replies] == steps


def test_an_agent_calls_a_tool_and_answers(generator: TurboQuantLocalChatGenerator, weather: Tool) -> None:
    metrics = MetricsCallback()
    agent = Agent(chat_generator=generator, tools=[weather], streaming_callback=metrics)

    _check(agent.run(WEATHER_QUESTION), metrics)


async def test_an_agent_does_so_asynchronously(generator: TurboQuantLocalChatGenerator, weather: Tool) -> None:
    metrics = MetricsCallback()
    agent = Agent(chat_generator=generator, tools=[weather])

    async def callback(chunk: StreamingChunk) -> None:
        metrics(chunk)

    _check(await agent.run_async(WEATHER_QUESTION, streaming_callback=callback), metrics)


def test_an_agent_goes_on_after_a_failing_tool(generator: TurboQuantLocalChatGenerator, weather: Tool) -> None:
    agent = Agent(chat_generator=generator, tools=[weather], max_agent_steps=4)

    result = agent.run([ChatMessage.from_user("What is the weather in Lima?")])

    failed = next(message.tool_call_result for message in result["messages"] if message.tool_call_result)
    assert failed.error
    assert result["last_message"].is_from("assistant")
    assert result["step_count"] == 2
