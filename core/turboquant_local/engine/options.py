"""Generation options: merged field by field, and checked before anything is generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from math import inf
from typing import Any, Final

from transformers import GenerationConfig

from turboquant_local.engine.grammar import check_schema
from turboquant_local.engine.reply_form import response_schema
from turboquant_local.engine.types import GenerationOptions
from turboquant_local.errors import GenerationOptionError, did_you_mean

_WITH_GENERATE: Final = "use TurboQuantCache with model.generate for that"
_ONE_SEQUENCE: Final = f"the engine generates one sequence on one cache; {_WITH_GENERATE}"
_SPECULATION: Final = f"the engine generates without a draft; {_WITH_GENERATE}"
_OWN_CACHE: Final = f"the engine brings its own cache; choose it with kv_cache, or {_WITH_GENERATE}"
_TENSORS: Final = f"the engine returns text, not tensors; {_WITH_GENERATE}"
_HOOK: Final = f"it is an argument of generate; {_WITH_GENERATE}"

_REFUSED: Final[Mapping[str, str]] = {
    "num_beams": _ONE_SEQUENCE,
    "num_beam_groups": _ONE_SEQUENCE,
    "num_return_sequences": _ONE_SEQUENCE,
    "constraints": _ONE_SEQUENCE,
    "force_words_ids": _ONE_SEQUENCE,
    "early_stopping": _ONE_SEQUENCE,
    "length_penalty": _ONE_SEQUENCE,
    "diversity_penalty": _ONE_SEQUENCE,
    "guidance_scale": _ONE_SEQUENCE,
    "penalty_alpha": _ONE_SEQUENCE,
    "dola_layers": _ONE_SEQUENCE,
    "continuous_batching_config": _ONE_SEQUENCE,
    "use_mtp": _SPECULATION,
    "is_assistant": _SPECULATION,
    "assistant_model": _SPECULATION,
    "assistant_early_exit": _SPECULATION,
    "assistant_confidence_threshold": _SPECULATION,
    "assistant_ensemble_weight": _SPECULATION,
    "assistant_lookbehind": _SPECULATION,
    "target_lookbehind": _SPECULATION,
    "num_assistant_tokens": _SPECULATION,
    "num_assistant_tokens_schedule": _SPECULATION,
    "prompt_lookup_num_tokens": _SPECULATION,
    "max_matching_ngram_size": _SPECULATION,
    "speculation_type": _SPECULATION,
    "past_key_values": _OWN_CACHE,
    "use_cache": _OWN_CACHE,
    "cache_implementation": _OWN_CACHE,
    "cache_config": _OWN_CACHE,
    "max_cache_len": _OWN_CACHE,
    "prefill_chunk_size": "the engine decides how a prompt is split",
    "token_healing": "it rewrites the prompt, whose tokens the engine counts and reuses",
    "watermarking_config": _WITH_GENERATE,
    "output_attentions": _TENSORS,
    "output_hidden_states": _TENSORS,
    "output_scores": _TENSORS,
    "output_logits": _TENSORS,
    "return_dict_in_generate": _TENSORS,
    "max_length": "use max_new_tokens",
    "stop_strings": "use stop",
    "streamer": "use ChatEngine.stream or astream",
    "logits_processor": _HOOK,
    "stopping_criteria": _HOOK,
    "prefix_allowed_tokens_fn": _HOOK,
    "custom_generate": _HOOK,
    "generation_config": "give its fields one by one",
}
"""Options that one streamed sequence on one kept cache cannot honour, with the way out."""

_NEUTRAL: Final[Mapping[str, object]] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "guidance_scale": 1,
}
"""Values of refused options that ask for what the engine does anyway."""

_BLANK: Final = GenerationConfig()

_JOINED: Final = ("template_kwargs", "extra")
"""Fields whose entries are laid over each other one by one."""

_OWN_FIELDS: Final = tuple(field.name for field in dataclasses.fields(GenerationOptions) if field.name not in _JOINED)


def merge_options(defaults: GenerationOptions | None, override: GenerationOptions | None) -> GenerationOptions:
    """Lay `override` over `defaults`, field by field; None (or an empty field) means not given.

    A default that contradicts what the override asks for gives way: a temperature given for one call samples even if
    the default says do_sample=False, and do_sample=True drops a default temperature of 0.
    """
    defaults, override = (_given(options) for options in (defaults, override))
    merged: dict[str, Any] = {}
    for field in dataclasses.fields(GenerationOptions):
        default, value = getattr(defaults, field.name), getattr(override, field.name)
        if field.name in _JOINED and isinstance(value, Mapping):  # anything else is for `check_options` to refuse
            merged[field.name] = {**default, **value}
        else:
            merged[field.name] = default if value is None or value == () else value
    if override.temperature is not None and override.do_sample is None:
        merged["do_sample"] = None
    if override.do_sample and override.temperature is None and defaults.temperature == 0:
        merged["temperature"] = None
    return GenerationOptions(**merged)


def _given(options: GenerationOptions | None) -> GenerationOptions:
    if options is None:
        return GenerationOptions()
    if not isinstance(options, GenerationOptions):
        raise GenerationOptionError(
            f"options={options!r}: expected GenerationOptions, such as GenerationOptions(seed=1)"
        )
    return options


def check_options(options: GenerationOptions) -> None:
    """Check every field without a model.

    Raises:
        GenerationOptionError: A value out of range, two that contradict each other, or an extra option that is
            unknown or that the engine cannot honour, or a `response_format` that no grammar can express.
        BackendError: A `response_format` without the library for grammars.
    """
    _whole("max_new_tokens", options.max_new_tokens, 1)
    _whole("top_k", options.top_k, 0)
    _number("temperature", options.temperature, "0 or more", lambda value: 0 <= value < inf)
    _number("top_p", options.top_p, "above 0 and at most 1", lambda value: 0 < value <= 1)
    _number("min_p", options.min_p, "from 0 to 1", lambda value: 0 <= value <= 1)
    _number("repetition_penalty", options.repetition_penalty, "above 0", lambda value: 0 < value < inf)
    _whole("seed", options.seed, 0)
    if options.seed is not None and options.seed >= 2**64:
        raise GenerationOptionError(f"seed={options.seed}: expected less than 2**64")
    for name in ("do_sample", "enable_thinking", "parallel_tool_calls"):
        value = getattr(options, name)
        if value is not None and not isinstance(value, bool):
            raise GenerationOptionError(f"{name}={value!r}: expected True, False or None")
    for name in _JOINED:
        if not isinstance(getattr(options, name), Mapping):
            raise GenerationOptionError(f"{name}={getattr(options, name)!r}: expected a dict")
    if options.do_sample and options.temperature == 0:
        raise GenerationOptionError("do_sample=True with temperature=0: drop one; temperature=0 means greedy")
    stop = options.stop
    if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) and text for text in stop):
        raise GenerationOptionError(f"stop={stop!r}: expected a tuple of strings that are not empty, such as ('###',)")
    if options.tool_choice is not None and not (isinstance(options.tool_choice, str) and options.tool_choice):
        raise GenerationOptionError(
            f"tool_choice={options.tool_choice!r}: expected 'auto', 'none', 'required' or the name of a tool"
        )
    check_schema(response_schema(options.response_format), "response_format['json_schema']['schema']")
    _check_extra(options.extra)


def _check_extra(extra: Mapping[str, Any]) -> None:
    known = [name for name in vars(_BLANK) if not name.startswith("_")]
    for name, value in extra.items():
        if name in _OWN_FIELDS:
            raise GenerationOptionError(
                f"extra[{name!r}]: it has a field of its own; use GenerationOptions({name}=...)"
            )
        if name in _REFUSED:
            if value is None or (name in _NEUTRAL and value == _NEUTRAL[name]):
                continue
            raise GenerationOptionError(f"{name}={value!r}: {_REFUSED[name]}")
        if name not in known:
            hint = did_you_mean(name, [*_OWN_FIELDS, *known], "did you mean {!r}?")
            way_out = hint or "see transformers.GenerationConfig for the known names"
            raise GenerationOptionError(f"{name}: no such generation option; {way_out}")
        if isinstance(value, str):  # those that take one are refused above
            raise GenerationOptionError(f"{name}={value!r}: expected a number, a list, True or False, got a string")


def _whole(name: str, value: object, least: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise GenerationOptionError(f"{name}={value!r}: expected an integer of {least} or more")


def _number(name: str, value: object, expected: str, fits: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value)):
        raise GenerationOptionError(f"{name}={value!r}: expected a number {expected}")
