"""From generated token ids to text that can be shown at once: incremental decoding and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from turboquant_local.errors import GenerationOptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TokenDecoder:
    """Decodes token by token; the pieces joined are the text of all tokens together.

    A token alone has no fixed text: it may be part of a character, and many tokenizers put the space before a
    word only when something precedes it. So each step decodes a short window, the tokens of the last piece and
    those not shown yet, and gives what the window grew by. This needs nothing but `tokenizer.decode` and so
    serves every kind of tokenizer. (`tokenizers.decoders.DecodeStream` slides the same window, but raises where
    a later byte makes a byte-fallback tokenizer decode an earlier one differently, and it cannot be flushed.)

    Special tokens stay in the text, because some of them mark tool calls; those that end a turn are left out by id.

    Args:
        tokenizer: The model's tokenizer; its end-of-text and padding tokens are the ones left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._skipped = (tokenizer.eos_token_id, tokenizer.pad_token_id)
        self._shown: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that is certain now, never half a character."""
        if token_id in self._skipped:
            return ""
        self._pending.append(token_id)
        text = self._decode(self._shown + self._pending)
        # A window that starts with a token without text could lose the space before the next word.
        if text.endswith(_INCOMPLETE) or len(text) <= len(self._decode(self._shown)):
            return ""
        return self._show(text)

    def flush(self) -> str:
        """Returns what is left at the end, an unfinished character as U+FFFD."""
        return self._show(self._decode(self._shown + self._pending)) if self._pending else ""

    def _show(self, text: str) -> str:
        before = self._decode(self._shown)
        # Bytes that only now turn out to be invalid can change text already shown, which cannot be taken back.
        piece = text[len(before) :] if text.startswith(before) else self._decode(self._pending)
        self._shown, self._pending = self._pending, []
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        # Cleaning up spaces would change text that was shown before.
        decoded = self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(decoded)


class StopStrings:
    """Ends a streamed text at the first stop string, which is never shown, nor is anything after it.

    The stop string that is complete first wins, wherever the text was cut into pieces.

    Args:
        stop: The stop strings.

    Attributes:
        stopped: Whether a stop string has come.

    Raises:
        GenerationOptionError: `stop` is no sequence of non-empty strings.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if isinstance(stop, str) or not all(isinstance(item, str) and item for item in stop):
            raise GenerationOptionError(f"stop={stop!r}: expected a sequence of non-empty strings, such as ['\\n\\n']")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Takes more text; returns what cannot belong to a stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max((partial_suffix(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Returns what was held back, now that no stop string can follow."""
        held, self._held = self._held, ""
        return held


def partial_suffix(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a beginning of `mark`, but not all of it."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)
