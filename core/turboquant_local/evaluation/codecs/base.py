"""What the measurements need of a codec, and how a window of tokens is fed so that a codec is seen as in decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache


class KVCodec(Protocol):
    """A way to store keys and values, ready to be measured.

    Attributes:
        name: Its name in tables.
    """

    @property
    def name(self) -> str:
        """Name in tables."""

    def cache(self, model_config: PreTrainedConfig) -> Cache:
        """A fresh, empty cache for a model."""

    def packed_length(self, length: int) -> int:
        """Tokens that are stored compressed once a sequence has `length` tokens."""

    def stored_bytes(self, model_config: PreTrainedConfig, tokens: int) -> int:
        """Bytes of one sequence of `tokens` tokens of a 16-bit model: codes, scales, windows and constants."""


def decoding_chunks(codec: KVCodec, length: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut `length` tokens into chunks whose queries see the cache as they would in token-by-token decoding.

    All tokens of a chunk are added before the first of them attends, and with them the packing that they cause. A
    chunk therefore ends where the next token would pack something, unless that makes it shorter than `chunk`: a
    codec that packs every token at once shows its latest `chunk` tokens uncompressed, in its favour. `chunk=1` is
    decoding itself.

    Args:
        codec: Says when it packs.
        length: Tokens to cut.
        chunk: Fewest tokens of a chunk.

    Yields:
        Start and stop of each chunk.
    """
    start = 0
    while start < length:
        stop, packed = start + 1, codec.packed_length(start + 1)
        while stop < length and (stop < start + chunk or codec.packed_length(stop + 1) == packed):
            stop += 1
        yield start, stop
        start = stop
