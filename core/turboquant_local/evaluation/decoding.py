"""Greedy decoding of a batch of prompts of equal length through any codec's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from turboquant_local.engine.loading import LoadedModel
from turboquant_local.evaluation.attention_switch import attention
from turboquant_local.evaluation.codecs.base import KVCodec


@dataclass(frozen=True)
class Prompt:
    """A document and a question about it.

    Attributes:
        ids: Token ids of the whole.
        question_length: Tokens at the end that make up the question.
        answer: What the reply must contain.
    """

    ids: list[int]
    question_length: int
    answer: str


@torch.inference_mode()
def decode(loaded: LoadedModel, prompts: Sequence[Prompt], codec: KVCodec, *, max_new_tokens: int) -> list[str]:
    """Answer prompts greedily.

    The document goes into the cache first and is packed; question and reply then read it from there, as the second
    turn of a conversation would. In a single prompt the question would see the document uncompressed.

    Args:
        loaded: The model.
        prompts: All of the same length.
        codec: How the cache stores them.
        max_new_tokens: Longest reply.

    Returns:
        The replies as text, special tokens included.
    """
    model: Any = loaded.model
    ends = end_ids(loaded)
    ids = torch.tensor([prompt.ids for prompt in prompts], device=model.device)
    split = ids.shape[1] - max(prompt.question_length for prompt in prompts)
    with attention(model):
        cache = codec.cache(model.config)
        model(ids[:, :split], past_key_values=cache, logits_to_keep=1)
        step = ids[:, split:]
        replies: list[list[int]] = [[] for _ in prompts]
        open_replies = set(range(len(prompts)))
        for _ in range(max_new_tokens):
            step = model(step, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            for index, token in enumerate(step.flatten().tolist()):
                if token in ends:
                    open_replies.discard(index)
                elif index in open_replies:
                    replies[index].append(token)
            if not open_replies:
                break
    return [str(loaded.tokenizer.decode(reply)) for reply in replies]


def end_ids(loaded: LoadedModel) -> list[int]:
    """Tokens that end a reply, from the generation config, the model's config and the tokenizer."""
    found: set[int] = set()
    for source in (loaded.defaults, loaded.model.config, loaded.tokenizer):
        value = getattr(source, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or ())
    return sorted(found)
