"""What the measurements need of a codec, and how a window of tokens is fed so that a codec is seen as in decoding."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import pairwise
from typing import Protocol

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache


class KVCodec(Protocol):
    """A way to store keys and values, ready to be measured."""

    @property
    def name(self) -> str:
        """Name in tables."""

    def cache(self, model_config: PreTrainedConfig) -> Cache:
        """A fresh, empty cache for a model."""

    def seen(self, length: int) -> Hashable:
        """What the newest of `length` tokens sees packed in token-by-token decoding; equal for equal states."""

    def stored_bytes(self, model_config: PreTrainedConfig, tokens: int) -> int:
        """Bytes of one sequence of `tokens` tokens of a 16-bit model: codes, scales, windows and constants."""


def decoding_chunks(codec: KVCodec, length: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut `length` tokens into chunks whose queries see the cache as they would in token-by-token decoding.

    All tokens of a chunk are added before the first of them attends, and see each other uncompressed. A new chunk
    therefore begins with every token that would see more of them packed than the one before it. A codec that packs so
    often that this takes more than two chunks for every `chunk` tokens is fed `chunk` tokens at a time instead.

    Args:
        codec: Says what a token sees.
        length: Tokens to cut.
        chunk: Tokens fed at a time to a codec that packs often; 1 never gives in.

    Yields:
        Start and stop of each chunk.
    """
    starts = [i for i in range(length) if i == 0 or codec.seen(i + 1) != codec.seen(i)]
    if len(starts) > 2 * length / chunk + 2:
        starts = list(range(0, length, chunk))
    yield from pairwise([*starts, length])
