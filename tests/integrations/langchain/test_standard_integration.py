"""LangChain's standard integration tests on the embedded model, once for each way to structured output.

The model is small and trained for demonstrations (`examples/tiny-model`). Six of the tests need one that understands.
It passes three by itself: test_tool_calling, twice, and test_tool_calling_async. In the other three, test_agent_loop,
twice, and test_unicode_tool_call_integration, a script makes given tokens the likely ones and leaves everything else to
the engine; `SCRIPTED` has the tokens and says what the model does wrong on its own.
"""

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from transformers import GenerationConfig

from langchain_turboquant_local import ChatTurboQuantLocal
from turboquant_local.testing import tiny_model as random_model

TINY_MODEL = Path(__file__).parents[3] / "examples" / "tiny-model"


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


SCRIPTED = {
    # On its own it stumbles over "San Francisco, CA", which it takes for two arguments.
    "test_agent_loop": (call("get_weather", '{"location": "San Francisco, CA"}'), "It is sunny."),
    # It knows English only: on its own it copies the Chinese name, and does not find the end of the Japanese one.
    "test_unicode_tool_call_integration": (
        call("unicode_customer", '{"customer_name": "你好啊集团", "description": "A Chinese technology company"}'),
        call("unicode_customer", '{"customer_name": "こんにちは株式会社", "description": "A Japanese company"}'),
    ),
}
"""Tests that need more understanding than the embedded model has, with the replies given to them."""

_folders = tempfile.TemporaryDirectory()


@cache
def second_model() -> str:
    """The folder of another model: random weights of another architecture, with the embedded model's tokenizer."""
    folder = Path(_folders.name) / "second-model"
    model = random_model("llama", vocab_size=4096)
    model.generation_config = GenerationConfig(max_new_tokens=8)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY_MODEL / file, folder / file)
    return str(folder)


# test_stream_time measures replayed HTTP; where there is none to record, it streams once and leaves the benchmark be.
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
class Suite(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[ChatTurboQuantLocal]:
        return ChatTurboQuantLocal

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": str(TINY_MODEL), "device": "cpu"}

    @property
    def model_override_value(self) -> str:
        return second_model()

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def enable_vcr_tests(self) -> bool:
        return True

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:  # type: ignore[override]
        details = ["cache_read_input", "reasoning_output"]
        return {"invoke": details, "stream": details}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        model = ChatTurboQuantLocal(**self.chat_model_params)
        first = HumanMessage("What is the capital of France?")
        answer = ask(model, [first, model.invoke([first]), HumanMessage("Hello")], stream=stream)
        assert answer.usage_metadata is not None
        assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
        return answer

    def invoke_with_reasoning_output(self, *, stream: bool = False) -> AIMessage:
        model = ChatTurboQuantLocal(**self.chat_model_params, reasoning=True)
        answer = ask(model, [HumanMessage("What is the capital of France?")], stream=stream)
        assert answer.usage_metadata is not None
        assert answer.usage_metadata["output_token_details"]["reasoning"] > 0
        return answer

    @pytest.fixture
    def model(
        self, request: pytest.FixtureRequest, tiny_model: str, script: Callable[..., object]
    ) -> ChatTurboQuantLocal:
        model = ChatTurboQuantLocal(**{**self.chat_model_params, **(getattr(request, "param", None) or {})})
        replies = SCRIPTED.get(request.node.originalname)
        if replies:
            script(model, *replies)
        return model


def ask(model: ChatTurboQuantLocal, conversation: list[BaseMessage], *, stream: bool) -> AIMessage:
    if not stream:
        return model.invoke(conversation)
    full = AIMessageChunk("")
    for chunk in model.stream(conversation):
        full += chunk
    return full


class TestJsonSchema(Suite):
    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_schema"}


class TestFunctionCalling(Suite):
    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "function_calling"}


class TestJsonMode(Suite):
    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_mode"}
