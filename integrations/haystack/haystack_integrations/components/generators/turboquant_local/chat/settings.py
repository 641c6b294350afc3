"""The component's words for loading and generating, checked and turned into the engine's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from haystack.utils import ComponentDevice, Secret
from pydantic import BaseModel

from turboquant_local.engine.loading import ModelSpec
from turboquant_local.engine.types import GenerationOptions
from turboquant_local.errors import ConfigError, GenerationOptionError

PIPELINE_KWARGS: Final = (
    "model",
    "task",
    "device",
    "device_map",
    "token",
    "dtype",
    "torch_dtype",
    "revision",
    "trust_remote_code",
    "model_kwargs",
)
"""Fields of `huggingface_pipeline_kwargs` that mean something to the engine."""

_LENGTH_WORDS: Final = ("max_new_tokens", "max_tokens", "max_completion_tokens")
_STOP_WORDS: Final = ("stop", "stop_words", "stop_sequences", "stop_strings")
_DTYPE_WORDS: Final = ("dtype", "torch_dtype")
_REFUSED: Final = {
    "return_full_text": "replies never repeat the prompt",
    "stopping_criteria": "use stop_words",
    "streamer": "use streaming_callback",
}
_PLAIN_OPTIONS: Final = frozenset(f.name for f in dataclasses.fields(GenerationOptions)) - {
    "stop",
    "template_kwargs",
    "extra",
}


def check_kinds(*, token: object = None, **callables: object) -> None:
    """Refuse arguments of the wrong kind now, not when they are used.

    Raises:
        ConfigError: A token that is no Secret, which would be written into YAML as it is (the message does not repeat
            it), or a callable that is none.
    """
    if not isinstance(token, (Secret, type(None))):
        raise ConfigError(
            f"token: expected a Secret or None, got a {type(token).__name__}; write Secret.from_env_var('HF_TOKEN'), "
            "or Secret.from_token(...) for a component that is never saved"
        )
    for name, value in callables.items():
        if value is not None and not callable(value):
            raise ConfigError(f"{name}={value!r}: expected a function or None, got a {type(value).__name__}")


def model_spec(
    model: str,
    task: str | None,
    device: ComponentDevice | None,
    dtype: str | None,
    pipeline_kwargs: Mapping[str, Any],
) -> ModelSpec:
    """Merge the constructor's words with `huggingface_pipeline_kwargs`, which win, as in the other local generator.

    Raises:
        ConfigError: A field that means nothing here, a task other than text generation, two different dtypes, or a
            value of the wrong kind.
    """
    _mapping("huggingface_pipeline_kwargs", pipeline_kwargs, ConfigError)
    for name in pipeline_kwargs:
        if name not in PIPELINE_KWARGS:
            raise ConfigError(
                f"huggingface_pipeline_kwargs[{name!r}]: no transformers pipeline is built here, so only "
                f"{', '.join(PIPELINE_KWARGS)} have a meaning; arguments of from_pretrained go into model_kwargs, "
                "those of generation into generation_kwargs"
            )
    task = pipeline_kwargs.get("task", task)
    if task not in (None, "text-generation"):
        raise ConfigError(f"task={task!r}: expected 'text-generation' or None; other tasks need another component")
    if device is not None and not isinstance(device, ComponentDevice):
        raise ConfigError(
            f"device={device!r}: expected a ComponentDevice or None; write ComponentDevice.from_str({str(device)!r})"
        )
    if isinstance(pipeline_kwargs.get("token"), Secret):
        raise ConfigError("huggingface_pipeline_kwargs['token']: expected a string, got a Secret; give it as token=...")
    model_kwargs = dict(_mapping("model_kwargs", pipeline_kwargs.get("model_kwargs") or {}, ConfigError))
    if "attn_implementation" in model_kwargs:
        raise ConfigError(
            "model_kwargs['attn_implementation']: the compressed cache brings its own attention; "
            "use kv_cache={'preset': 'uncompressed'} for transformers' own"
        )
    dtypes = [dtype, *(pipeline_kwargs.get(name) for name in _DTYPE_WORDS)]
    dtypes += [model_kwargs.pop(name, None) for name in _DTYPE_WORDS]
    device_map = pipeline_kwargs.get("device_map")
    where = pipeline_kwargs.get("device")
    if where is None and device_map is None and device is not None:
        if device.has_multiple_devices:
            device_map = device.to_hf()
        else:
            where = device.to_torch_str()
    if device_map is not None:
        model_kwargs["device_map"] = device_map
    return ModelSpec(
        model=pipeline_kwargs.get("model", model),
        device=_device_name(where),
        dtype=_dtype_name(dtypes),
        revision=pipeline_kwargs.get("revision"),
        token=pipeline_kwargs.get("token"),
        trust_remote_code=bool(pipeline_kwargs.get("trust_remote_code", False)),
        model_kwargs=model_kwargs,
    )


def generation_options(
    kwargs: Mapping[str, Any], *, stop_words: Sequence[str] | None = None, enable_thinking: bool | None = None
) -> GenerationOptions:
    """Read `generation_kwargs`; names that are not the engine's own go to the model's generation config.

    Args:
        kwargs: What the user wrote, in the words of transformers or of Haystack's other generators.
        stop_words: More stop strings.
        enable_thinking: Used where `kwargs` does not say.

    Raises:
        GenerationOptionError: An option that cannot be honoured, or one that is given twice.
    """
    options = dict(_mapping("generation_kwargs", kwargs, GenerationOptionError))
    for name, way_out in _REFUSED.items():
        if options.pop(name, None):
            raise GenerationOptionError(f"generation_kwargs[{name!r}]: {way_out}")
    lengths = {name: options.pop(name) for name in _LENGTH_WORDS if options.get(name) is not None}
    if any(length != next(iter(lengths.values())) for length in lengths.values()):
        raise GenerationOptionError(f"generation_kwargs: {lengths} are one limit; keep max_new_tokens")
    if "n" in options:
        options["num_return_sequences"] = options.pop("n")
    template_kwargs = _mapping(
        "generation_kwargs['chat_template_kwargs']",
        options.pop("chat_template_kwargs", None) or {},
        GenerationOptionError,
    )
    stop = [*_strings("stop_words", stop_words)]
    for name in _STOP_WORDS:
        stop += _strings(name, options.pop(name, None))
    own: dict[str, Any] = {"enable_thinking": enable_thinking}
    if lengths:
        own["max_new_tokens"] = next(iter(lengths.values()))
    own |= {name: options.pop(name) for name in _PLAIN_OPTIONS & options.keys()}
    own["response_format"] = plain_response_format(own.get("response_format"))
    own["tool_choice"] = _tool_choice(own.get("tool_choice"))
    return GenerationOptions(**own, stop=tuple(dict.fromkeys(stop)), template_kwargs=template_kwargs, extra=options)


def plain_response_format(value: Any) -> Any:
    """A pydantic model as the JSON schema it stands for, in OpenAI's words; anything else as it is."""
    if not (isinstance(value, type) and issubclass(value, BaseModel)):
        return value
    return {"type": "json_schema", "json_schema": {"name": value.__name__, "schema": value.model_json_schema()}}


def _tool_choice(value: Any) -> Any:
    """The name of a tool that is chosen as OpenAI's API writes it; anything else as it is, for the engine to check."""
    function = value.get("function") if isinstance(value, Mapping) else None
    return function.get("name") if isinstance(function, Mapping) else value


def _mapping(name: str, value: Any, error: type[ConfigError | GenerationOptionError]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise error(f"{name}={value!r}: expected a dict, got a {type(value).__name__}")
    return value


def _strings(name: str, value: object) -> list[str]:
    words = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) and word for word in words):
        raise GenerationOptionError(f"{name}={value!r}: expected a list of strings that are not empty")
    return list(words)


def _device_name(device: object) -> str | None:
    if isinstance(device, bool) or not isinstance(device, (int, str, torch.device, type(None))):
        raise ConfigError(f"device={device!r}: expected a string such as 'cuda:0', a torch.device, an int or None")
    if isinstance(device, int):  # transformers' pipelines count GPUs from 0 and call the CPU -1
        return "cpu" if device < 0 else f"cuda:{device}"
    return None if device is None else str(device)


def _dtype_name(values: Iterable[object]) -> str | None:
    names = {str(value).removeprefix("torch.") for value in values if value is not None}
    if len(names) > 1:
        raise ConfigError(f"dtype: given twice, as {' and '.join(sorted(names))}; keep one")
    return names.pop() if names else None
