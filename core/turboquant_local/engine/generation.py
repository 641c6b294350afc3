"""One reply: prefill what is new of the prompt, decode token by token, and turn tokens into events."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from turboquant_local.cache import TurboQuantCache
from turboquant_local.config import TurboQuantConfig
from turboquant_local.engine.loading import LoadedModel
from turboquant_local.engine.metrics import collect_metrics, peak_memory, start_peak_memory
from turboquant_local.engine.prefill import first_part, prefill
from turboquant_local.engine.prompt_cache import PromptCache, log_once
from turboquant_local.engine.request import Request
from turboquant_local.engine.streaming import Emit
from turboquant_local.engine.text import StopStrings, TokenDecoder
from turboquant_local.engine.types import ChatReply, FinishReason, Usage


class ReplyReader(StoppingCriteria):
    """Reads each token as soon as it is chosen: emits what it adds to the reply and says whether to go on.

    For `generate` this is a stopping criterion rather than a streamer: it asks the criteria first, so a stop string or
    a cancellation is seen with the very token it falls on.
    """

    def __init__(self, request: Request, tokenizer: Any, emit: Emit) -> None:
        self.token_ids: list[int] = []
        self.reasoning_tokens = 0
        self.end: FinishReason | None = None
        self._request = request
        self._decoder = TokenDecoder(tokenizer)
        self._stops = StopStrings(request.sampling.stop)
        self._emit = emit

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Read the newest of the ids [1, length]; returns [1], True to stop."""
        # On some devices `generate` runs one step past the end before it looks, and undoes that step.
        ends = self.end is not None or self.read(int(input_ids[0, -1]))
        return torch.tensor([ends], device=input_ids.device)

    def finish(self) -> None:
        """Emit what was held back: half a character, or the beginning of what might have become a stop string."""
        self._emit_text(self._stops.push(self._decoder.flush()) + self._stops.flush())
        for delta in self._request.parser.finish():
            self._emit(delta)

    @property
    def finish_reason(self) -> FinishReason:
        """Why the reply ended; "length" if `generate` itself ended it."""
        return "tool_calls" if self._request.parser.tool_calls else self.end or "length"

    def read(self, token_id: int) -> bool:
        """Read the newest token; returns whether the reply ends with it."""
        request = self._request
        request.stopwatch.token()
        self.token_ids.append(token_id)
        was_in_reasoning = request.parser.in_reasoning
        if token_id in request.sampling.end_ids:
            self.end = "stop"
        else:
            is_complete = request.constraint is not None and request.constraint.accept(token_id)
            self._emit_text(self._stops.push(self._decoder.push(token_id)))
            if self._stops.stopped or is_complete:
                self.end = "stop"
            elif len(self.token_ids) >= request.sampling.config.max_new_tokens:
                self.end = "length"
            elif request.is_cancelled():
                self.end = "cancelled"
        self.reasoning_tokens += was_in_reasoning or request.parser.in_reasoning
        return self.end is not None

    def _emit_text(self, text: str) -> None:
        if text:
            for delta in self._request.parser.push(text):
                self._emit(delta)


@torch.inference_mode(False)  # a tensor made in it could not be written to in a later call outside of it
def generate_reply(loaded: LoadedModel, kept: PromptCache, request: Request, emit: Emit) -> ChatReply:
    """Generate one reply and leave its tokens in the kept cache.

    An error leaves no cache behind, as its layers may be uneven.

    Args:
        loaded: The model.
        kept: The cache of the calls before.
        request: What to generate.
        emit: Called with each event, as soon as it is known.
    """
    reader = ReplyReader(request, loaded.tokenizer, emit)
    start_peak_memory(loaded.device)
    try:
        cache, cached_tokens = kept.prepare(loaded.model, request.prompt_ids)
        prompt = torch.tensor([request.prompt_ids], device=loaded.device)  # [1, length]
        with torch.cuda.device_of(prompt):  # events, streams and captures are those of the current device
            decoding = _run(loaded.model, kept, cache, cached_tokens, prompt, request, reader)
        kept.record([*request.prompt_ids, *reader.token_ids])
    except BaseException:
        kept.drop()
        raise
    reader.finish()
    usage = Usage(len(request.prompt_ids), len(reader.token_ids), cached_tokens, reader.reasoning_tokens)
    return _reply(loaded, request, kept.config, reader.finish_reason, usage, tuple(reader.token_ids), cache, decoding)


def cancelled_reply(loaded: LoadedModel, request: Request, kv_cache: TurboQuantConfig) -> ChatReply:
    """The reply to a request that was cancelled before its turn came."""
    return _reply(loaded, request, kv_cache, "cancelled", Usage(len(request.prompt_ids), 0), (), None, "")


def _run(
    model: Any,
    kept: PromptCache,
    cache: TurboQuantCache,
    cached_tokens: int,
    prompt: torch.Tensor,
    request: Request,
    reader: ReplyReader,
) -> str:
    """Generate; returns how it was decoded."""
    obstacle = kept.decode_loop.refusal(model, cache, request.sampling.config)
    if obstacle is None:
        decoding = kept.decode_loop.run(model, cache, prompt, request.sampling, reader.read)
    else:
        kept.decode_loop.release(cache)
        packed = first_part(model, cache, prompt.shape[1])
        if packed > cached_tokens:
            prefill(model, cache, prompt[:, cached_tokens:packed], packed - cached_tokens)
        if request.is_cancelled():
            reader.end = "cancelled"
            return ""
        decoding = f"eager: {obstacle}"
        # Given all ids and a mask of the same length, `generate` itself leaves out what the cache holds.
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            generation_config=request.sampling.config,
            logits_processor=request.sampling.processors,
            stopping_criteria=StoppingCriteriaList([reader]),
        )
        if cache.get_seq_length() < prompt.shape[1] + len(reader.token_ids) - 1:  # Phi-3, where its rotation changes
            decoding += "; the model went on in a cache of its own, uncompressed"
            log_once(f"{model.config.model_type}: {decoding}")
    if decoding.startswith("eager") and model.device.type == "cuda":
        log_once(f"{model.config.model_type}: tokens are decoded without a CUDA graph: {decoding}")
    return decoding


def _reply(
    loaded: LoadedModel,
    request: Request,
    kv_cache: TurboQuantConfig,
    finish_reason: FinishReason,
    usage: Usage,
    token_ids: tuple[int, ...],
    cache: TurboQuantCache | None,
    decoding: str,
) -> ChatReply:
    metrics = collect_metrics(
        request.stopwatch,
        usage,
        cache,
        kv_cache,
        device=loaded.device,
        dtype=loaded.model.dtype,
        peak_device_memory=peak_memory(loaded.device),
        decoding=decoding,
    )
    parser = request.parser
    return ChatReply(
        text=parser.text,
        reasoning=parser.reasoning,
        tool_calls=tuple(parser.tool_calls),
        finish_reason=finish_reason,
        usage=usage,
        metrics=metrics,
        token_ids=token_ids,
        first_token_at=request.stopwatch.first_token_at,
    )
