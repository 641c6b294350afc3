from typing import Any

import pytest
import torch
from haystack.utils import ComponentDevice, Secret
from haystack.utils.device import DeviceMap

from haystack_integrations.components.generators.turboquant_local.chat.settings import (
    generation_options,
    model_spec,
)
from turboquant_local.engine.loading import ModelSpec
from turboquant_local.engine.options import check_options
from turboquant_local.engine.types import GenerationOptions
from turboquant_local.errors import ConfigError, GenerationOptionError


def _load(pipeline_kwargs: dict[str, Any] | None = None, **words: Any) -> ModelSpec:
    return model_spec(
        words.get("model", "m"), words.get("task"), words.get("device"), words.get("dtype"), pipeline_kwargs or {}
    )


def test_pipeline_kwargs_win_over_the_constructor() -> None:
    given = {
        "model": "other",
        "device": 1,
        "token": "hf_x",
        "torch_dtype": torch.bfloat16,
        "revision": "main",
        "trust_remote_code": True,
        "model_kwargs": {"low_cpu_mem_usage": True},
    }

    assert _load(given, device=ComponentDevice.from_str("cpu")) == ModelSpec(
        model="other",
        device="cuda:1",
        dtype="bfloat16",
        revision="main",
        token="hf_x",
        trust_remote_code=True,
        model_kwargs={"low_cpu_mem_usage": True},
    )


@pytest.mark.parametrize(
    ("device", "name"), [(-1, "cpu"), (0, "cuda:0"), ("mps", "mps"), (torch.device("cuda", 2), "cuda:2"), (None, None)]
)
def test_devices_of_transformers_pipelines(device: object, name: str | None) -> None:
    assert _load({"device": device}).device == name


def test_a_component_device_becomes_a_name_or_a_map() -> None:
    split = ComponentDevice.from_multiple(DeviceMap.from_hf({"model": 0, "lm_head": "cpu"}))

    assert _load(device=ComponentDevice.from_str("cuda:1")).device == "cuda:1"
    assert _load(device=split) == ModelSpec(model="m", model_kwargs={"device_map": {"model": 0, "lm_head": "cpu"}})
    assert _load({"device_map": "auto"}, device=ComponentDevice.from_str("cuda:1")) == ModelSpec(
        model="m", model_kwargs={"device_map": "auto"}
    )


@pytest.mark.parametrize("where", [{"dtype": "float16"}, {"model_kwargs": {"torch_dtype": "torch.float16"}}])
def test_a_dtype_may_stand_in_several_places_but_only_once(where: dict[str, Any]) -> None:
    assert _load(where).dtype == "float16"
    assert _load(where, dtype="float16").dtype == "float16"
    with pytest.raises(ConfigError, match="given twice, as bfloat16 and float16"):
        _load(where, dtype="bfloat16")


@pytest.mark.parametrize(
    ("pipeline_kwargs", "words", "complaint"),
    [
        ({"batch_size": 4}, {}, r"'batch_size'\]: no transformers pipeline is built here"),
        ({"task": "image-text-to-text"}, {}, "expected 'text-generation' or None"),
        ({}, {"task": "summarization"}, "task='summarization'"),
        ({"model": object()}, {}, "expected a folder or a name"),
        ({"dtype": "int4"}, {}, "dtype='int4'"),
        ({"device": "gpu"}, {}, "device='gpu'"),
        ({}, {"device": "cuda:0"}, r"ComponentDevice.from_str\('cuda:0'\)"),
        ({"device": 1.5}, {}, "device=1.5"),
        ({"model_kwargs": {"attn_implementation": "sdpa"}}, {}, "brings its own attention"),
        ({"model_kwargs": 3}, {}, "model_kwargs=3: expected a dict, got a int"),
        ({"token": Secret.from_token("hf_x")}, {}, "give it as token="),
        ("cpu", {}, "huggingface_pipeline_kwargs='cpu': expected a dict"),
    ],
)
def test_what_cannot_be_loaded_is_refused(pipeline_kwargs: Any, words: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        _load(pipeline_kwargs, **words)


def test_the_words_of_other_generators_mean_the_same() -> None:
    options = generation_options(
        {
            "max_completion_tokens": 20,
            "temperature": 0.7,
            "seed": 3,
            "stop": "END",
            "stop_sequences": ["###", "END"],
            "n": 1,
            "return_full_text": False,
            "chat_template_kwargs": {"tone": "kind"},
            "no_repeat_ngram_size": 3,
        },
        stop_words=["STOP"],
        enable_thinking=True,
    )

    assert options == GenerationOptions(
        max_new_tokens=20,
        temperature=0.7,
        seed=3,
        stop=("STOP", "END", "###"),
        enable_thinking=True,
        template_kwargs={"tone": "kind"},
        extra={"num_return_sequences": 1, "no_repeat_ngram_size": 3},
    )
    check_options(options)


def test_generation_kwargs_may_turn_thinking_on() -> None:
    assert generation_options({"enable_thinking": True}, enable_thinking=False).enable_thinking is True
    assert generation_options({}).enable_thinking is None


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        ({"n": 2}, "num_return_sequences=2"),
        ({"num_return_sequences": 3}, "num_return_sequences=3"),
        ({"past_key_values": object()}, "choose it with kv_cache"),
        ({"max_length": 100}, "use max_new_tokens"),
        ({"max_tokens": 5, "max_new_tokens": 6}, "keep max_new_tokens"),
        ({"streamer": object()}, "use streaming_callback"),
        ({"stopping_criteria": [object()]}, "use stop_words"),
        ({"return_full_text": True}, "never repeat the prompt"),
        ({"stop_words": 7}, "stop_words=7: expected a list of strings"),
        ({"stop": [""]}, "not empty"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs.*expected a dict, got a str"),
        ({"max_new_tokens": [5]}, r"max_new_tokens=\[5\]: expected an integer"),
        ({3: 4}, "3: no such generation option"),
        ("temperature", "generation_kwargs='temperature': expected a dict, got a str"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
    ],
)
def test_what_cannot_be_generated_is_refused(kwargs: Any, complaint: str) -> None:
    with pytest.raises(GenerationOptionError, match=complaint):
        check_options(generation_options(kwargs))
