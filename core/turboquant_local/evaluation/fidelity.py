"""What a codec changes in a model's predictions: perplexity, KL divergence, top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from turboquant_local.config import TurboQuantConfig
from turboquant_local.errors import EvaluationError
from turboquant_local.evaluation.attention_switch import attention
from turboquant_local.evaluation.codecs.base import KVCodec, decoding_chunks
from turboquant_local.evaluation.codecs.turboquant import TurboQuantCodec
from turboquant_local.evaluation.intervals import mean_interval
from turboquant_local.evaluation.windows import CONTEXT

CHUNK = 32
"""Tokens that are fed to a compressed cache at a time, at least."""

UNCOMPRESSED = TurboQuantCodec("uncompressed", TurboQuantConfig(preset="uncompressed"))
"""The baseline: transformers' own layers and attention."""


@dataclass(frozen=True)
class Fidelity:
    """How close a model with a compressed cache stays to itself with an uncompressed one.

    Attributes:
        codec: Name of the codec.
        windows: Windows of text.
        scored_tokens: Predictions compared.
        perplexity: exp of the mean log loss with the codec.
        reference_perplexity: The same, uncompressed.
        perplexity_change: `perplexity / reference_perplexity - 1`.
        perplexity_interval: 95 % confidence interval of that change, paired over windows; None for one window.
        kl_mean: Mean of KL(uncompressed || compressed) over the scored tokens, in nats.
        kl_median: Its median.
        kl_tail: Its 99.9 % quantile.
        top1_agreement: Share of tokens where both put the same token first.
    """

    codec: str
    windows: int
    scored_tokens: int
    perplexity: float
    reference_perplexity: float
    perplexity_change: float
    perplexity_interval: tuple[float, float] | None
    kl_mean: float
    kl_median: float
    kl_tail: float
    top1_agreement: float


@torch.inference_mode()
def measure_fidelity(
    model: Any,
    windows: torch.Tensor,
    codecs: Sequence[KVCodec],
    *,
    context: int = CONTEXT,
    chunk: int = CHUNK,
    batch_size: int = 1,
    on_progress: Callable[[str], None] | None = None,
) -> list[Fidelity]:
    """Score windows with compressed caches in use, against the same windows uncompressed.

    Every window goes through a fresh cache in chunks (see `decoding_chunks`), so that each scored token attends to
    a cache in the state it has while decoding. The logits of one batch of windows are kept while the codecs take
    their turns: `batch_size * (length - context) * vocabulary` numbers in the model's dtype.

    Args:
        model: A causal language model, on the device where it is to run.
        windows: `[windows, length]` token ids.
        codecs: What to measure.
        context: Tokens at the start of a window that are not scored.
        chunk: Fewest tokens fed at a time.
        batch_size: Windows fed together.
        on_progress: Called with a codec's name after each batch it has scored.

    Returns:
        One result a codec, in their order.

    Raises:
        EvaluationError: The context leaves nothing to score.
    """
    length = windows.shape[1]
    if not 0 <= context < length - 1:
        raise EvaluationError(
            f"context={context}: expected 0 to {length - 2}, so that windows of {length} tokens have tokens to score"
        )
    scores = [_Scores() for _ in codecs]
    for batch in windows.split(batch_size):
        ids = batch.to(model.device)
        targets = ids[:, context + 1 :]
        reference = _logits(model, ids, UNCOMPRESSED, context)
        for codec, score in zip(codecs, scores, strict=True):
            score.start(len(batch))
            position = 0
            for logits in _chunk_logits(model, ids, codec, context, chunk):
                part = slice(position, position + logits.shape[1])
                score.add(reference[:, part], logits, targets[:, part])
                position = part.stop
            if on_progress is not None:
                on_progress(codec.name)
    return [score.result(codec.name) for codec, score in zip(codecs, scores, strict=True)]


def _logits(model: Any, ids: torch.Tensor, codec: KVCodec, context: int) -> torch.Tensor:
    """All scored logits at once: `[batch, length - 1 - context, vocabulary]`."""
    scored = ids.shape[1] - 1 - context
    with attention(model):
        cache = codec.cache(model.config)
        logits: torch.Tensor = model(ids[:, :-1], past_key_values=cache, logits_to_keep=scored).logits
    return logits


def _chunk_logits(model: Any, ids: torch.Tensor, codec: KVCodec, context: int, chunk: int) -> Iterator[torch.Tensor]:
    """The same, chunk by chunk."""
    with attention(model):
        cache = codec.cache(model.config)
        for start, stop in decoding_chunks(codec, ids.shape[1] - 1, chunk):
            scored = stop - max(start, context)
            logits = model(ids[:, start:stop], past_key_values=cache, logits_to_keep=max(scored, 1)).logits
            if scored > 0:
                yield logits


@dataclass
class _Scores:
    """Sums of one codec over windows."""

    divergence: list[torch.Tensor] = field(default_factory=list)  # [batch, tokens] each
    agreement: list[torch.Tensor] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)  # [batch] each: the window's summed log loss
    reference_losses: list[torch.Tensor] = field(default_factory=list)

    def start(self, windows: int) -> None:
        self.losses.append(torch.zeros(windows))
        self.reference_losses.append(torch.zeros(windows))

    def add(self, reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        p, q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
        self.divergence.append((p.exp() * (p - q)).sum(-1).clamp_min(0))  # below 0 only by rounding
        self.agreement.append(p.argmax(-1) == q.argmax(-1))
        for losses, predicted in ((self.reference_losses, p), (self.losses, q)):
            loss = predicted.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            losses[-1] = losses[-1].to(loss.device) - loss.double().sum(-1)

    def result(self, name: str) -> Fidelity:
        divergence = torch.cat([part.flatten() for part in self.divergence]).double().cpu()
        agreement = torch.cat([part.flatten() for part in self.agreement]).double().cpu()
        losses, reference = (torch.cat(parts).cpu() for parts in (self.losses, self.reference_losses))
        tokens = divergence.numel() // len(losses)
        difference = ((losses - reference) / tokens).tolist()
        interval = mean_interval(difference)
        return Fidelity(
            codec=name,
            windows=len(losses),
            scored_tokens=divergence.numel(),
            perplexity=math.exp(losses.mean() / tokens),
            reference_perplexity=math.exp(reference.mean() / tokens),
            perplexity_change=math.expm1(sum(difference) / len(difference)),
            perplexity_interval=None if interval is None else (math.expm1(interval[0]), math.expm1(interval[1])),
            kl_mean=float(divergence.mean()),
            kl_median=float(divergence.median()),
            kl_tail=_quantile(divergence, 0.999),
            top1_agreement=float(agreement.mean()),
        )


def _quantile(values: torch.Tensor, share: float) -> float:
    """`torch.quantile` refuses more than 16 million values."""
    ordered = values.sort().values
    return float(ordered[math.ceil(share * (len(ordered) - 1))])
