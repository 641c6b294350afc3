"""A request that was checked and is ready to be generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import LogitsProcessorList

from turboquant_local.engine.grammar import Constraint, make_constraint
from turboquant_local.engine.loading import LoadedModel
from turboquant_local.engine.metrics import Stopwatch
from turboquant_local.engine.parsing import ReplyParser, ToolParser
from turboquant_local.engine.prompt import opens_reasoning, prompt_end
from turboquant_local.engine.reply_form import reply_form
from turboquant_local.engine.sampling import Sampling, resolve_sampling
from turboquant_local.engine.types import GenerationOptions, Tool
from turboquant_local.errors import ContextLengthError


@dataclass(frozen=True)
class Request:
    """What one generation needs besides the model and the cache.

    Attributes:
        prompt_ids: The rendered prompt.
        sampling: How tokens are chosen and what ends the reply.
        constraint: Holds the reply to its form; None if it is free.
        parser: Splits this reply into text, thinking and tool calls.
        stopwatch: Started when the request came.
        is_cancelled: Asked after each token.
    """

    prompt_ids: list[int]
    sampling: Sampling
    constraint: Constraint | None
    parser: ReplyParser
    stopwatch: Stopwatch
    is_cancelled: Callable[[], bool]


def prepare_request(
    loaded: LoadedModel,
    prompt_ids: list[int],
    *,
    options: GenerationOptions,
    tools: Sequence[Tool],
    tool_parser: ToolParser | None,
    stopwatch: Stopwatch,
    is_cancelled: Callable[[], bool],
) -> Request:
    """Check that the prompt fits, and settle how its reply is sampled and parsed.

    Raises:
        ContextLengthError: The prompt leaves no room for a reply.
        GenerationOptionError: An option that the model or transformers refuses, or a form of the reply that cannot
            be forced.
        BackendError: A form is asked for, and the library for grammars is missing or cannot read the tokenizer.
    """
    room = loaded.context_length - len(prompt_ids)
    if room < 1:
        raise ContextLengthError(
            f"messages: the prompt has {len(prompt_ids)} tokens, the model's context has {loaded.context_length}, and "
            "the reply needs at least one; shorten the messages, drop old turns, or use a model with a longer context"
        )
    sampling = resolve_sampling(
        options, loaded.defaults, room=room, eos_token_id=loaded.tokenizer.eos_token_id, device=loaded.device
    )
    form, constraint = reply_form(options, tools), None
    if form is not None:
        constraint = make_constraint(
            form,
            loaded.tokenizer,
            prompt_end=prompt_end(loaded.tokenizer, prompt_ids),
            may_think=options.enable_thinking is not False,
            end_ids=sorted(sampling.end_ids),
        )
        sampling = replace(sampling, processors=LogitsProcessorList([constraint, *sampling.processors]))
    parser = ReplyParser(
        tools=tools,
        starts_in_reasoning=opens_reasoning(loaded.tokenizer, prompt_ids),
        tokenizer=loaded.tokenizer,
        # A forced call is written in a format known here.
        tool_parser=tool_parser if form is None else None,
        is_constrained=form is not None,
    )
    return Request(prompt_ids, sampling, constraint, parser, stopwatch, is_cancelled)
