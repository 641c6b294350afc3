"""From generation options to what transformers' `generate` takes: a config and the logits processors.

Sampling is exact Gumbel-max: the greedy choice over `log p + Gumbel noise` is a sample from `p`. The noise comes from a
generator of our own, so that a seed belongs to one call and the process-wide random state is never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from turboquant_local.engine.types import GenerationOptions
from turboquant_local.errors import GenerationOptionError

DEFAULT_MAX_NEW_TOKENS: Final = 512
"""Used where neither the caller nor the model's generation config says."""

_DEFAULT_TOP_K: Final = 50
"""What transformers' `generate` takes when nobody says."""

# In the order in which transformers applies them: name, when it does something, how it is built.
_WARPERS: Final[tuple[tuple[str, Callable[[float], bool], Callable[[Any, torch.device], LogitsProcessor]], ...]] = (
    ("temperature", lambda value: value != 1, lambda value, _: TemperatureLogitsWarper(float(value))),
    ("top_h", lambda _: True, lambda value, _: TopHLogitsWarper(value)),
    ("top_k", lambda value: value != 0, lambda value, _: TopKLogitsWarper(value)),
    ("top_p", lambda value: value < 1, lambda value, _: TopPLogitsWarper(float(value))),
    ("min_p", lambda value: value > 0, lambda value, _: MinPLogitsWarper(value)),
    ("typical_p", lambda value: value != 1, lambda value, _: TypicalLogitsWarper(value)),
    ("epsilon_cutoff", lambda value: value != 0, lambda value, _: EpsilonLogitsWarper(value)),
    ("eta_cutoff", lambda value: value != 0, lambda value, device: EtaLogitsWarper(value, device=str(device))),
)

# Transformers' processors insist on floats where a user may well write 1 or 2.
_GIVEN: Final[tuple[tuple[str, Callable[[Any], float]], ...]] = (
    ("max_new_tokens", int),
    ("temperature", float),
    ("top_k", int),
    ("top_p", float),
    ("min_p", float),
    ("repetition_penalty", float),
)

_NOT_OURS: Final = (
    "max_length",
    "stop_strings",
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "early_stopping",
    "length_penalty",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "prefill_chunk_size",
    "token_healing",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
)
"""Fields that a model's generation config may set and the engine decides itself."""


class GumbelNoise(LogitsProcessor):
    """Add Gumbel noise to the scores, so that their maximum is a sample from their softmax.

    Args:
        seed: Makes the noise repeatable; None draws a seed.
        device: Where the scores are.
    """

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [batch_size, vocab_size] with noise; -inf stays -inf."""
        waiting = torch.empty_like(scores).exponential_(generator=self._generator)
        return scores - waiting.clamp_min_(torch.finfo(scores.dtype).tiny).log_()


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one reply are chosen.

    Attributes:
        config: For `generate`: complete, greedy (the sampling is in the processors).
        processors: Warpers and noise; empty for greedy.
        end_ids: Tokens that end the reply.
        stop: Strings that end the reply.
    """

    config: GenerationConfig
    processors: LogitsProcessorList
    end_ids: frozenset[int]
    stop: tuple[str, ...]


def resolve_sampling(
    options: GenerationOptions,
    defaults: GenerationConfig,
    *,
    room: int,
    eos_token_id: int | None,
    device: torch.device,
) -> Sampling:
    """Combine the caller's options with the model's defaults.

    Args:
        options: Checked options.
        defaults: The model's own generation config; it is not changed.
        room: Tokens that fit behind the prompt; more are not generated.
        eos_token_id: The tokenizer's end token, for a model that names none.
        device: Where the scores will be.

    Raises:
        GenerationOptionError: An extra option with a value that transformers refuses.
    """
    config = copy.deepcopy(defaults)
    for name, value in options.extra.items():
        setattr(config, name, value)
    for name, kind in _GIVEN:
        if (value := getattr(options, name)) is not None:
            setattr(config, name, kind(value))

    processors = LogitsProcessorList()
    if _samples(options, config):
        if config.top_k is None:
            config.top_k = _DEFAULT_TOP_K
        processors.extend(_warpers(config, device))
        processors.append(GumbelNoise(options.seed, device))

    stop = options.stop or tuple(_listed(config.stop_strings))
    for name in (*_NOT_OURS, *(name for name, _, _ in _WARPERS)):
        # A name that this version of transformers does not know must not become a custom entry.
        if hasattr(config, name):
            setattr(config, name, None)
    config.do_sample = False
    config.use_cache = True
    config.max_new_tokens = min(config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, room)
    if config.eos_token_id is None:
        config.eos_token_id = eos_token_id
    try:
        config.validate()
    except (ValueError, TypeError) as error:
        raise GenerationOptionError(f"extra={dict(options.extra)!r}: {error}") from error
    return Sampling(config, processors, frozenset(_listed(config.eos_token_id)), tuple(stop))


def _samples(options: GenerationOptions, config: GenerationConfig) -> bool:
    if options.temperature == 0:
        return False
    if options.do_sample is not None:
        return options.do_sample
    # A model's own temperature of 0 can only mean greedy.
    return options.temperature is not None or (bool(config.do_sample) and config.temperature != 0)


def _warpers(config: GenerationConfig, device: torch.device) -> list[LogitsProcessor]:
    warpers = []
    for name, is_active, build in _WARPERS:
        value = getattr(config, name, None)
        if value is None:
            continue
        try:
            if is_active(value):
                warpers.append(build(value, device))
        except (ValueError, TypeError) as error:
            raise GenerationOptionError(f"{name}={value!r}: {error}") from error
    return warpers


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
