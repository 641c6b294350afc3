import copy
import json
from typing import Any

import pytest
import torch
import yaml
from haystack import Pipeline
from haystack.components.agents import Agent
from haystack.components.builders import PromptBuilder
from haystack.components.generators.utils import print_streaming_chunk
from haystack.core.errors import DeserializationError, SerializationError
from haystack.tools import ComponentTool, Toolset
from haystack.utils import ComponentDevice, Secret

from haystack_integrations.components.generators.turboquant_local import MetricsCallback, TurboQuantLocalChatGenerator
from turboquant_local.config import TurboQuantConfig

TYPE = "haystack_integrations.components.generators.turboquant_local.chat.chat_generator.TurboQuantLocalChatGenerator"


def _greet() -> ComponentTool:
    return ComponentTool(PromptBuilder("Hello {{ name }}!", required_variables=["name"]), name="greet")


def _again(generator: TurboQuantLocalChatGenerator) -> TurboQuantLocalChatGenerator:
    return TurboQuantLocalChatGenerator.from_dict(yaml.safe_load(yaml.safe_dump(generator.to_dict())))


def test_the_defaults_are_those_of_the_other_local_generator() -> None:
    assert TurboQuantLocalChatGenerator().to_dict() == {
        "type": TYPE,
        "init_parameters": {
            "model": "Qwen/Qwen3-0.6B",
            "task": None,
            "device": None,
            "token": {"type": "env_var", "env_vars": ["HF_API_TOKEN", "HF_TOKEN"], "strict": False},
            "chat_template": None,
            "generation_kwargs": {},
            "huggingface_pipeline_kwargs": {},
            "stop_words": None,
            "streaming_callback": None,
            "tools": None,
            "tool_parsing_function": None,
            "enable_thinking": False,
            "kv_cache": None,
            "dtype": None,
        },
    }


def test_every_setting_survives_yaml() -> None:
    generator = TurboQuantLocalChatGenerator(
        model="some/model",
        task="text-generation",
        device=ComponentDevice.from_str("cuda:1"),
        token=Secret.from_env_var("MY_TOKEN"),
        chat_template="{{ messages }}",
        generation_kwargs={"max_new_tokens": 7, "stop": ["#"]},
        huggingface_pipeline_kwargs={
            "torch_dtype": torch.float16,
            "token": "hf_secret",
            "model_kwargs": {"quantization_config": {"bnb_4bit_compute_dtype": torch.bfloat16}},
        },
        stop_words=["END"],
        streaming_callback=print_streaming_chunk,
        tools=[_greet()],
        enable_thinking=True,
        kv_cache={"preset": "compact", "sink_length": 8},
        dtype="float16",
    )

    loaded = _again(generator)

    assert "hf_secret" not in json.dumps(generator.to_dict())
    assert loaded.to_dict() == generator.to_dict()
    assert loaded.streaming_callback is print_streaming_chunk
    assert loaded.device == ComponentDevice.from_str("cuda:1")
    assert loaded.token == Secret.from_env_var("MY_TOKEN")
    assert loaded.huggingface_pipeline_kwargs["model_kwargs"] == {
        "quantization_config": {"bnb_4bit_compute_dtype": torch.bfloat16}
    }
    assert loaded._kv_config == TurboQuantConfig(preset="compact", sink_length=8)


def test_bits_of_single_layers_survive_yaml() -> None:
    pipeline = Pipeline()
    kv_cache = {"preset": "compact", "layer_bits": {5: (6, 4), 7: [6, 4]}}
    pipeline.add_component("llm", TurboQuantLocalChatGenerator(kv_cache=kv_cache))
    loaded = Pipeline.loads(pipeline.dumps()).get_component("llm")
    assert loaded.kv_cache == {"preset": "compact", "layer_bits": {"5": [6, 4], "7": [6, 4]}}
    assert kv_cache == {"preset": "compact", "layer_bits": {5: (6, 4), 7: [6, 4]}}


def test_a_config_object_becomes_plain_fields() -> None:
    loaded = _again(TurboQuantLocalChatGenerator(kv_cache=TurboQuantConfig(preset="extreme", seed=3)))

    assert loaded._kv_config == TurboQuantConfig(preset="extreme", seed=3)


def test_a_toolset_stays_a_toolset() -> None:
    loaded = _again(TurboQuantLocalChatGenerator(tools=Toolset([_greet()])))

    assert isinstance(loaded.tools, Toolset)
    assert [tool.name for tool in loaded.tools] == ["greet"]


def test_a_metrics_callback_is_written_out_with_what_stands_behind_it() -> None:
    loaded = _again(TurboQuantLocalChatGenerator(streaming_callback=MetricsCallback(print_streaming_chunk)))

    assert isinstance(loaded.streaming_callback, MetricsCallback)
    assert loaded.streaming_callback.then is print_streaming_chunk


def test_a_function_of_a_trusted_module_loads() -> None:
    pipeline = Pipeline()
    pipeline.add_component("llm", TurboQuantLocalChatGenerator(tool_parsing_function=json.loads))
    text = pipeline.dumps()

    assert Pipeline.loads(text, allowed_modules=["json"]).get_component("llm").tool_parsing_function is json.loads
    with pytest.raises(DeserializationError, match="allow"):
        Pipeline.loads(text)


@pytest.mark.parametrize("word", ["streaming_callback", "tool_parsing_function"])
def test_a_lambda_cannot_be_written_out(word: str) -> None:
    words: dict[str, Any] = {word: lambda argument: None}

    with pytest.raises(SerializationError, match="lambdas"):
        TurboQuantLocalChatGenerator(**words).to_dict()


def test_reading_leaves_the_dict_as_it_was() -> None:
    data = TurboQuantLocalChatGenerator(
        tools=[_greet()], streaming_callback=MetricsCallback(), device=ComponentDevice.from_str("cpu")
    ).to_dict()
    before = copy.deepcopy(data)

    TurboQuantLocalChatGenerator.from_dict(data)

    assert data == before


@pytest.mark.parametrize("rest", ["", ", init_parameters: null", ", init_parameters: {}"])
def test_parameters_may_be_left_out(rest: str) -> None:
    pipeline = Pipeline.loads(f"components: {{llm: {{type: {TYPE}{rest}}}}}")

    assert pipeline.get_component("llm").model == "Qwen/Qwen3-0.6B"


@pytest.mark.usefixtures("weights")
def test_a_pipeline_is_dumped_loaded_and_run(tiny_model: str) -> None:
    pipeline = Pipeline()
    pipeline.add_component("llm", TurboQuantLocalChatGenerator(model=tiny_model, kv_cache={"k_bits": 4, "v_bits": 3}))
    pipeline.run({"llm": {"messages": "Hello!"}})

    loaded = Pipeline.loads(pipeline.dumps())
    result = loaded.run({"llm": {"messages": "What is the capital of France?"}})

    assert loaded.dumps() == pipeline.dumps()
    assert result["llm"]["replies"][0].text == "The capital of France is Paris."
    assert result["llm"]["replies"][0].meta["turboquant"]["kv_cache"]["v_bits"] == 3
    pipeline.close()
    loaded.close()


def test_an_agent_writes_its_generator_out(tiny_model: str) -> None:
    agent = Agent(chat_generator=TurboQuantLocalChatGenerator(model=tiny_model), tools=[_greet()])

    loaded = Agent.from_dict(agent.to_dict())

    assert isinstance(loaded.chat_generator, TurboQuantLocalChatGenerator)
    assert loaded.chat_generator.model == tiny_model


@pytest.mark.usefixtures("weights")
def test_a_relative_folder_counts_from_the_working_directory(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_model + "/..")
    generator = TurboQuantLocalChatGenerator.from_dict({"type": TYPE, "init_parameters": {"model": "tiny-model"}})

    reply = generator.run("What is the capital of France?")["replies"][0]

    assert reply.text == "The capital of France is Paris."
    assert reply.meta["model"] == "tiny-model"
    generator.close()
