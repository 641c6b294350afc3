"""What a call may ask for, and the generation options that come of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from turboquant_local.engine import options as engine
from turboquant_local.engine.types import GenerationOptions
from turboquant_local.errors import GenerationOptionError, did_you_mean

_RENAMED: Final[Mapping[str, str]] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
    "seed": "seed",
    "reasoning": "enable_thinking",
    "response_format": "response_format",
    "parallel_tool_calls": "parallel_tool_calls",
}
"""LangChain's words for options, with the engine's."""

_LANGCHAINS_WORDS: Final[Mapping[str, str]] = {own: name for name, own in _RENAMED.items()} | {
    "extra": "generation_kwargs",
    "GenerationOptions": "ChatTurboQuantLocal",
}
# What stands in quotes is the caller's own.
_ENGINES_WORD: Final = re.compile(rf"(?<!')\b({'|'.join(_LANGCHAINS_WORDS)})\b")

# "stream" is for LangChain, which has chosen the method by it; "n" may only be 1.
CALL_OPTIONS: Final = (*_RENAMED, "model", "stop", "tools", "tool_choice", "strict", "stream", "n")
"""Every option that a call may give, besides the messages."""


def check_call(given: Mapping[str, Any]) -> None:
    """Refuse what a call cannot ask for.

    Raises:
        GenerationOptionError: An unknown option, or more than one reply.
    """
    for name in given:
        if name not in CALL_OPTIONS:
            hint = did_you_mean(name, CALL_OPTIONS, "did you mean {!r}? ")
            raise GenerationOptionError(
                f"{name}: no such option of a call; {hint}known: {', '.join(CALL_OPTIONS)}; other fields of "
                "transformers' GenerationConfig go into the constructor's generation_kwargs"
            )
    if given.get("n") not in (None, 1):
        raise GenerationOptionError(
            f"n={given['n']!r}: one reply is generated for each conversation; for more, call batch with the "
            "conversation repeated and a temperature above 0"
        )


def generation_options(given: Mapping[str, Any], *, stop: Sequence[str] | str | None) -> GenerationOptions:
    """The engine's options among what is given, by LangChain's names; None means not given.

    Args:
        given: Options by name; names that are no generation options are left aside.
        stop: Strings that end the reply.
    """
    renamed = {own: given[name] for name, own in _RENAMED.items() if given.get(name) is not None}
    # What is no list of strings is left for `check_options` to refuse.
    listed = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Sequence) else stop or ()
    return GenerationOptions(**renamed, stop=listed)


def check_options(options: GenerationOptions) -> None:
    """Check the engine's options without a model; an error names them in LangChain's words.

    Raises:
        GenerationOptionError: As the engine's own check.
        BackendError: As the engine's own check.
    """
    try:
        engine.check_options(options)
    except GenerationOptionError as error:
        raise GenerationOptionError(_ENGINES_WORD.sub(lambda word: _LANGCHAINS_WORDS[word[0]], str(error))) from None
