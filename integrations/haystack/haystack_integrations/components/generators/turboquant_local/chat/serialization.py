"""The component's parameters as plain values and back, for a pipeline's YAML."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final

from haystack.tools import deserialize_tools_or_toolset_inplace, serialize_tools_or_toolset
from haystack.utils import deserialize_callable, serialize_callable
from haystack.utils.hf import deserialize_hf_model_kwargs, serialize_hf_model_kwargs

from haystack_integrations.components.generators.turboquant_local.chat.settings import plain_response_format
from turboquant_local.errors import ConfigError, did_you_mean

_CALLABLES: Final = ("streaming_callback", "tool_parsing_function")


def plain_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Write parameters out, leaving to `default_to_dict` whatever has a `to_dict`, such as a MetricsCallback.

    A pydantic model given as `response_format` becomes its JSON schema. The executor lives in one process only, and
    a token must not reach a file: both are left out.

    Raises:
        SerializationError: A callback or parser that cannot be imported by name, such as a lambda.
    """
    plain = dict(parameters)
    del plain["async_executor"]
    generation_kwargs = parameters["generation_kwargs"]
    if "response_format" in generation_kwargs:
        response_format = plain_response_format(generation_kwargs["response_format"])
        plain["generation_kwargs"] = {**generation_kwargs, "response_format": response_format}
    pipeline_kwargs = copy.deepcopy(parameters["huggingface_pipeline_kwargs"])
    pipeline_kwargs.pop("token", None)
    serialize_hf_model_kwargs(pipeline_kwargs)
    plain["huggingface_pipeline_kwargs"] = pipeline_kwargs
    plain["tools"] = serialize_tools_or_toolset(parameters["tools"])
    for name in _CALLABLES:
        if plain[name] is not None and not hasattr(plain[name], "to_dict"):
            plain[name] = serialize_callable(plain[name])
    return plain


def live_parameters(plain: Mapping[str, Any] | None, known: Sequence[str]) -> dict[str, Any]:
    """Read back what `plain_parameters` wrote, into objects of its own.

    Args:
        plain: Parameters by name; None if there are none.
        known: Names of all parameters.

    Raises:
        ConfigError: A name that is not known.
        DeserializationError: A callable from a module that Haystack was not told to trust.
    """
    parameters = copy.deepcopy(dict(plain or {}))
    for name in parameters:
        if name not in known:
            raise ConfigError(f"{name}: no such parameter{did_you_mean(name, known)}; known: {', '.join(known)}")
    deserialize_tools_or_toolset_inplace(parameters)
    deserialize_hf_model_kwargs(parameters.get("huggingface_pipeline_kwargs") or {})
    for name in _CALLABLES:
        if isinstance(parameters.get(name), str):
            parameters[name] = deserialize_callable(parameters[name])
    return parameters
