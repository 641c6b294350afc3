"""Each mistake gets an error of its own that names the way out, before anything is generated."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from haystack import Pipeline
from haystack.core.errors import DeserializationError
from haystack.dataclasses import ChatMessage, ImageContent
from haystack.tools import Tool
from haystack.utils import Secret

from haystack_integrations.components.generators.turboquant_local import TurboQuantLocalChatGenerator
from turboquant_local.errors import (
    ChatTemplateError,
    ConfigError,
    ContextLengthError,
    GenerationOptionError,
    ModelLoadError,
    PromptError,
    ToolSchemaError,
)

TYPE = "haystack_integrations.components.generators.turboquant_local.chat.chat_generator.TurboQuantLocalChatGenerator"


@pytest.mark.parametrize(
    ("words", "error", "complaint"),
    [
        ({"kv_cache": {"preset": "balancd"}}, ConfigError, "did you mean 'balanced'"),
        ({"kv_cache": "tiny"}, ConfigError, "expected one of balanced"),
        ({"kv_cache": {"k_bits": 5}}, ConfigError, "k_bits=5: expected one of 1, 2, 3, 4, 6, 8, 16"),
        ({"kv_cache": {"kbits": 4}}, ConfigError, "did you mean 'k_bits'"),
        ({"kv_cache": 4}, ConfigError, "expected a preset's name, a dict of fields"),
        ({"dtype": "int4"}, ConfigError, "dtype='int4': expected one of"),
        ({"task": "summarization"}, ConfigError, "expected 'text-generation' or None"),
        ({"model": ""}, ConfigError, "expected a folder or a name"),
        ({"huggingface_pipeline_kwargs": {"batch_size": 2}}, ConfigError, "arguments of from_pretrained go into"),
        ({"generation_kwargs": {"n": 2}}, GenerationOptionError, "one sequence"),
        ({"generation_kwargs": {"temprature": 1}}, GenerationOptionError, "did you mean 'temperature'"),
        ({"generation_kwargs": {"max_new_tokens": 0}}, GenerationOptionError, "expected an integer of 1 or more"),
        (
            {"streaming_callback": "print"},
            ConfigError,
            "streaming_callback='print': expected a function or None, got a str",
        ),
        ({"tool_parsing_function": 3}, ConfigError, "tool_parsing_function=3: expected a function"),
        ({"stop_words": "#", "generation_kwargs": {"stop": 1}}, GenerationOptionError, "expected a list of strings"),
    ],
)
def test_a_wrong_setting_fails_in_the_constructor(
    words: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        TurboQuantLocalChatGenerator(**words)


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ("kv_cach: {preset: compact}", r"kv_cach: no such parameter .*\(did you mean 'kv_cache'"),
        ("generator_kwargs: {}", "did you mean 'generation_kwargs'"),
        ("kv_cache: {presets: compact}", "did you mean 'preset'"),
        ("generation_kwargs: {top_q: 1}", "did you mean 'top_"),
    ],
)
def test_a_wrong_key_in_yaml_is_named(parameters: str, complaint: str) -> None:
    with pytest.raises(DeserializationError, match=complaint):
        Pipeline.loads(f"components: {{llm: {{type: {TYPE}, init_parameters: {{{parameters}}}}}}}")


@pytest.mark.parametrize(
    ("messages", "error", "complaint"),
    [
        ("word " * 5_000, ContextLengthError, "shorten the messages"),
        ([ChatMessage.from_user("")], None, ""),
        (
            [ChatMessage.from_user(content_parts=[ImageContent("AAAA", mime_type="image/png", validation=False)])],
            PromptError,
            r"messages\[0\] \(user\): holds ImageContent",
        ),
        ([{"role": "user", "content": "Hi"}], TypeError, "list.ChatMessage. or str"),
    ],
)
def test_a_conversation_that_cannot_be_answered(
    generator: TurboQuantLocalChatGenerator, messages: Any, error: type[Exception] | None, complaint: str
) -> None:
    if error is None:
        assert len(generator.run(messages)["replies"]) == 1
        return
    with pytest.raises(error, match=complaint):
        generator.run(messages)


def test_a_broken_tool_is_named(generator: TurboQuantLocalChatGenerator, weather: Tool) -> None:
    weather.parameters = {"type": "object", "properties": {"city": {"type": "text"}}}

    with pytest.raises(ToolSchemaError, match=r"tool 'get_weather', parameters.properties.city.type"):
        generator.run("Hello!", tools=[weather])


def test_a_wrong_option_of_one_run_is_named(generator: TurboQuantLocalChatGenerator) -> None:
    with pytest.raises(GenerationOptionError, match="choose it with kv_cache"):
        generator.run("Hello!", generation_kwargs={"past_key_values": object()})


def _copy_of(model: str, folder: Path, *, without: str) -> str:
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns(without, "*.py", "*.md"))
    return str(folder)


def test_a_model_without_a_chat_template(tiny_model: str, tmp_path: Path) -> None:
    model = _copy_of(tiny_model, tmp_path / "base", without="chat_template.jinja")
    settings = Path(model) / "tokenizer_config.json"
    kept = {name: value for name, value in json.loads(settings.read_text()).items() if name != "chat_template"}
    settings.write_text(json.dumps(kept))
    generator = TurboQuantLocalChatGenerator(model=model)

    with pytest.raises(ChatTemplateError, match="has no chat template"):
        generator.run("Hello!")
    generator.close()


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer*"])
def test_a_folder_with_missing_files(tiny_model: str, tmp_path: Path, missing: str) -> None:
    model = _copy_of(tiny_model, tmp_path / "broken", without=missing)

    with pytest.raises(ModelLoadError, match="broken"):
        TurboQuantLocalChatGenerator(model=model).warm_up()


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="nowhere"):
        TurboQuantLocalChatGenerator(model=str(tmp_path / "nowhere")).warm_up()


def test_a_token_in_plain_text_is_refused_and_not_repeated() -> None:
    # It would reach a saved pipeline as it is.
    with pytest.raises(ConfigError, match="token: expected a Secret or None, got a str") as told:
        TurboQuantLocalChatGenerator(token="hf_secret")  # type: ignore[arg-type]
    assert "hf_secret" not in str(told.value)


def test_a_callback_of_one_run_that_cannot_be_called(generator: TurboQuantLocalChatGenerator) -> None:
    with pytest.raises(ConfigError, match="streaming_callback='print'"):
        generator.run("Hello!", streaming_callback="print")  # type: ignore[arg-type]


def test_a_token_that_is_not_set_is_missed_when_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    generator = TurboQuantLocalChatGenerator(token=Secret.from_env_var("NO_SUCH_TOKEN"))

    with pytest.raises(ValueError, match="NO_SUCH_TOKEN"):
        generator.warm_up()
