"""Settings and call options: taken, renamed, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from langchain_turboquant_local import ChatTurboQuantLocal
from langchain_turboquant_local.options import CALL_OPTIONS, generation_options
from turboquant_local import TurboQuantConfig
from turboquant_local.engine import GenerationOptions
from turboquant_local.errors import GenerationOptionError, ModelLoadError

FRANCE = "What is the capital of France?"


def test_options_are_renamed() -> None:
    given = {"max_tokens": 5, "reasoning": False, "temperature": 0.0, "top_p": None, "model": "x"}
    assert generation_options(given, stop=["a", "b"]) == GenerationOptions(
        max_new_tokens=5, enable_thinking=False, temperature=0.0, stop=("a", "b")
    )
    assert generation_options({}, stop="a").stop == ("a",)


def test_the_options_of_langchain_are_all_taken(model: ChatTurboQuantLocal, tiny_model: str) -> None:
    given = {
        "model": tiny_model,
        "temperature": 0,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": 20,
        "seed": 1,
        "stop": ["#"],
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "reasoning": False,
        "stream": False,
        "strict": True,
        "parallel_tool_calls": True,
        "n": 1,
    }
    assert set(CALL_OPTIONS) - given.keys() == {"min_p", "repetition_penalty"}
    assert model.invoke(FRANCE, **given).content == "The capital of France is Paris."


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temprature": 1}, "temprature: no such option.*did you mean 'temperature'"),
        ({"logit_bias": {}}, "logit_bias: no such option.*generation_kwargs"),
        ({"n": 2}, "n=2: one reply.*batch"),
        ({"temperature": -1}, "temperature=-1"),
        ({"max_tokens": 0}, "^max_tokens=0: expected"),
        ({"reasoning": 1}, "reasoning=1: expected"),
        ({"stop": [""]}, "stop="),
        ({"stop": 5}, "stop=5: expected"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"tool_choice": "any"}, "no tool is bound"),
    ],
)
async def test_other_options_are_refused_and_never_dropped(
    model: ChatTurboQuantLocal, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(GenerationOptionError, match=named):
        model.invoke(FRANCE, **options)
    with pytest.raises(GenerationOptionError, match=named):
        list(model.bind(**options).stream(FRANCE))
    with pytest.raises(GenerationOptionError, match=named):
        await model.ainvoke(FRANCE, **options)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kv_cache": "tiny"}, "preset='tiny'"),
        ({"kv_cache": {"k_bit": 4}}, "k_bit.*did you mean 'k_bits'"),
        ({"dtype": "int7"}, "dtype='int7'"),
        ({"device": "toaster"}, "device='toaster'"),
        ({"temperature": -1}, "temperature=-1"),
        ({"max_tokens": 0}, " max_tokens=0: expected"),
        ({"generation_kwargs": {"num_beams": 4}}, "num_beams=4"),
        (
            {"generation_kwargs": {"max_new_tokens": 5}},
            r"generation_kwargs\['max_new_tokens'\].*ChatTurboQuantLocal\(max_tokens=",
        ),
        ({"generation_kwargs": {"max_length": 5}}, "max_length=5: use max_tokens"),
        ({"max_token": 5}, "max_token: no such setting; did you mean 'max_tokens'"),
        ({"do_sample": True}, "do_sample: no such setting;.*generation_kwargs"),
        ({"n": 2}, "n: no such setting"),
        ({"model_kwargs": {"revision": "v1"}}, r"model_kwargs\['revision'\].*as revision"),
    ],
)
def test_broken_settings_are_refused_at_once(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        ChatTurboQuantLocal(model="Qwen/Qwen3-0.6B", **settings)


@pytest.mark.parametrize(
    "kv_cache", ["compact", {"preset": "compact"}, {"k_bits": 3, "v_bits": 3}, TurboQuantConfig(preset="compact")]
)
def test_the_cache_is_set_as_in_haystack(make_model: Callable[..., ChatTurboQuantLocal], kv_cache: Any) -> None:
    model = make_model(kv_cache=kv_cache)
    settings = model.invoke(FRANCE).response_metadata["turboquant"]["kv_cache"]
    assert (settings["k_bits"], settings["v_bits"]) == (3, 3)
    assert model.vram_bytes() > 0
    model.close()
    assert model.vram_bytes() == 0


def test_a_missing_model_is_told_with_the_first_call() -> None:
    with pytest.raises(ModelLoadError, match="no such folder"):
        ChatTurboQuantLocal(model="./no/such/folder").invoke(FRANCE)


def test_what_every_chat_model_takes_is_taken() -> None:
    model = ChatTurboQuantLocal(model="Qwen/Qwen3-0.6B", api_key="x", timeout=3, max_retries=2, stop="#")
    assert model.stop == ["#"]


def test_traces_name_provider_model_and_settings(make_model: Callable[..., ChatTurboQuantLocal]) -> None:
    model = make_model(temperature=0.5, stop=["#"])
    assert model._get_ls_params(model="other") == {
        "ls_provider": "turboquant_local",
        "ls_model_name": "other",
        "ls_model_type": "chat",
        "ls_temperature": 0.5,
        "ls_max_tokens": 48,
        "ls_stop": ["#"],
    }
    assert model.metadata is not None
    assert "turboquant-local" in model.metadata["lc_versions"]
