"""Decoding token by token over fixed buffers, a step being one CUDA graph.

Python takes longer to launch a model's step than a GPU to run it, so the step is captured once and replayed. What the
host does with a token (stop strings, text, the grammar) is done while the GPU runs the step after it; where a reply
turns out to have ended, that step is taken back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Final

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from turboquant_local.cache import TurboQuantCache
from turboquant_local.cache.cache import ATTENTION_NAME
from turboquant_local.cache.layer import settle
from turboquant_local.cache.static import StaticStorage, begins_packing, forget_buffers, static_refusal, window_length
from turboquant_local.engine.decode_step import DecodeStep, forward
from turboquant_local.engine.prefill import first_part, prefill
from turboquant_local.engine.sampling import Sampling
from turboquant_local.errors import CacheError

Read = Callable[[int], bool]
"""Takes each token as soon as it is known; says whether the reply ends with it."""

_AHEAD: Final = 4096
"""Tokens of a reply that room is made for at once, at most."""

_SMALLEST_ROOM: Final = 512
"""Room for far tokens comes in multiples of this, and of a sixteenth of the next power of two."""

_KEPT: Final = 16_384
"""Far tokens, at most, of buffers that stay while a prompt comes in: what it adds is joined to what there is in new
memory, so for a while both take as much."""

_SERVED: Final = (
    "max_new_tokens", "eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "repetition_penalty",
    "use_cache", "transformers_version", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
)  # fmt: skip
"""Fields of a generation config that this loop follows, or that mean nothing here."""


class DecodeLoop:
    """Generates replies; keeps buffers and graph from one to the next.

    Args:
        capture: Capture the step in a CUDA graph. If not, the same step runs as it is, on any device.
    """

    def __init__(self, capture: bool = True) -> None:
        self._capture = capture
        self._storage: StaticStorage | None = None
        self._step: DecodeStep | None = None
        self._unfit: str | None = None  # why the model cannot decode in buffers, once that is known

    def refusal(self, model: Any, cache: TurboQuantCache, config: GenerationConfig) -> str | None:
        """Why a reply must be left to transformers' `generate`, or None.

        Args:
            model: The model.
            cache: Its cache.
            config: How the reply is generated.
        """
        if self._unfit:
            return self._unfit
        if self._capture and model.device.type != "cuda":
            return f"no CUDA graphs on {model.device.type}"
        for name in ("generate", "prepare_inputs_for_generation"):
            if getattr(type(model), name) is not getattr(GenerationMixin, name):
                return f"{type(model).__name__} has a {name} of its own"
        if "position_ids" not in inspect.signature(model.forward).parameters:
            return f"{type(model).__name__} takes no position_ids"
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            return "the model is spread over several devices"
        options = [
            name
            for name, value in vars(config).items()
            if name not in _SERVED and not name.startswith("_") and value not in (None, False, 0, 1, [], {})
        ]
        if options:
            return f"option {options[0]}"
        reads_buffers = model.config.get_text_config(decoder=True)._attn_implementation == ATTENTION_NAME
        own = None if reads_buffers else f"{type(model).__name__} has an attention of its own"
        return static_refusal(cache) or own

    def release(self, cache: TurboQuantCache | None = None) -> None:
        """Free buffers and graph, but for the buffers in which a cache has tokens."""
        self._storage = self._step = None
        if cache is not None:
            forget_buffers(cache)

    @torch.no_grad()
    def run(self, model: Any, cache: TurboQuantCache, prompt: torch.Tensor, sampling: Sampling, read: Read) -> str:
        """Generate a reply. An error leaves the cache useless.

        Args:
            model: The model.
            cache: Holds the beginning of the prompt, but not its last token.
            prompt: `[1, length]`.
            sampling: How tokens are chosen.
            read: Called with every token.

        Returns:
            How it was decoded, see `GenerationMetrics.decoding`.
        """
        length, held, most = prompt.shape[1], cache.get_seq_length(), sampling.config.max_new_tokens
        ids = torch.cat([prompt, prompt.new_empty(1, most)], dim=1)
        choose, fetch = _chooser(sampling), _Fetch(prompt.device)
        if self._storage is not None and self._storage.far_capacity > _KEPT:
            self.release(cache)
        split = max(0, first_part(model, cache, length) - held)
        scores = prefill(model, cache, prompt[:, held:], split, settled=False)
        storage: StaticStorage | None = None
        how = ""
        with getattr(model, "_optimize_model_for_decode", nullcontext)():
            for left in reversed(range(most)):
                token = choose(ids[:, :length], scores)
                ids[:, length] = token
                length += 1
                fetch.start(token)
                # A token is read before something slow, or something that cannot be taken back, is done for the next.
                at_once = storage is None or storage.waits or not left
                ends = at_once and (read(fetch.wait()) or not left)
                if storage is None:
                    settle(cache.layers)  # what the prompt has left: its first token is out
                if ends:
                    break
                if at_once:
                    storage = self._made_ready(model, cache, storage, left)
                if storage is None:
                    scores = forward(model, cache, ids[:, length - 1 : length])
                    continue
                storage.advance()
                assert self._step is not None
                try:
                    scores, how = self._step(cache, token, length - 1), self._step.how
                except CacheError as error:  # the model does more with keys, values or mask than attend to them
                    self._give_up(storage, cache, f"{type(model).__name__} cannot decode in buffers ({error})")
                    storage = None
                    scores, how = forward(model, cache, ids[:, length - 1 : length]), f"eager: {self._unfit}"
                if not at_once and read(fetch.wait()):
                    if storage is not None:
                        storage.drop_last()
                    break
        if storage is not None:
            storage.give_back(cache)
        elif self._storage is not None:
            self._storage.count_in(cache)
        return how

    def _give_up(self, storage: StaticStorage, cache: TurboQuantCache, reason: str) -> None:
        """Take back a step that failed, and let all others do without buffers."""
        storage.drop_last()
        storage.give_back(cache)
        self.release(cache)
        self._unfit = reason

    def _made_ready(
        self, model: Any, cache: TurboQuantCache, storage: StaticStorage | None, left: int
    ) -> StaticStorage | None:
        """Do what must be done before the next token; None if it needs the cache in its snapshot form."""
        length = cache.get_seq_length()
        if storage is not None and (begins_packing(cache) or not storage.fits(length + 1)):
            storage.give_back(cache)
            storage = None
        if storage is None:
            if self._unfit or begins_packing(cache):
                return None
            storage = self._storage_for(model, cache, length + min(left, _AHEAD))
            storage.take_from(cache)
        storage.settle()
        return storage

    def _storage_for(self, model: Any, cache: TurboQuantCache, length: int) -> StaticStorage:
        """Buffers for so many tokens: those there are, if their sizes fit."""
        room, kept = _room(cache.kv_cache.far_length(length)), self._storage
        fits = kept is not None and room <= kept.far_capacity <= _room(room + 1)
        if kept is None or not fits or kept.window != window_length(cache):
            del kept
            self.release(cache)
            self._storage, self._step = StaticStorage(cache, room), DecodeStep(model, self._capture)
        assert self._storage is not None
        return self._storage


def _room(far_length: int) -> int:
    """Far tokens to make room for: coarse, so that graphs serve many replies and are rarely made anew."""
    step = max(_SMALLEST_ROOM, (1 << max(far_length - 1, 0).bit_length()) // 16)
    return max(1, -(-far_length // step)) * step


def _chooser(sampling: Sampling) -> Callable[[Any, Any], torch.Tensor]:
    """What picks the next token `[1]` from all ids `[1, length]` and scores `[1, vocab_size]`, as `generate` would."""
    processors = LogitsProcessorList(sampling.processors)
    penalty = sampling.config.repetition_penalty
    if penalty not in (None, 1):
        processors.insert(0, RepetitionPenaltyLogitsProcessor(penalty))
    return lambda ids, scores: processors(ids, scores).argmax(-1)


class _Fetch:
    """Brings a token to the host without stopping the device."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._host = torch.empty(1, dtype=torch.long, device="cpu", pin_memory=self._event is not None)

    def start(self, token: torch.Tensor) -> None:
        self._host.copy_(token, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def wait(self) -> int:
        if self._event is not None:
            self._event.synchronize()
        return int(self._host)
