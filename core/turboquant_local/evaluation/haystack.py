"""Prompts of an exact number of tokens: facts laid into running text, and a question about one of them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final

from turboquant_local.errors import EvaluationError
from turboquant_local.evaluation.decoding import Prompt
from turboquant_local.evaluation.windows import text_prefix

_HERE: Final = "@@here@@"
_SHORTEST_SENTENCE: Final = 30
"""Characters; shorter pieces are headings and the like."""


class Haystack:
    """Running text as sentences of tokens, and the model's chat format around it.

    Prompts are put together from tokens, so that those of one length fill a batch without padding.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        """Cut a text into sentences.

        Args:
            tokenizer: The model's tokenizer. Without a chat template, a plain "Answer:" follows the question.
            text: The running text.

        Raises:
            EvaluationError: The text has no sentences.
        """
        self._tokenizer = tokenizer
        pieces = re.split(r"(?<=[.!?])\s+|\n+", text)
        sentences = [piece.strip() for piece in pieces if len(piece.strip()) >= _SHORTEST_SENTENCE]
        if not sentences:
            raise EvaluationError("text: expected sentences to hide facts in, found none; give a longer text")
        self._sentences = [self.encode(" " + sentence) for sentence in sentences]
        self._before, self._after = self._frame()

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of a prompt."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _frame(self) -> tuple[list[int], list[int]]:
        """What stands before and after a user's message."""
        if self._tokenizer.chat_template is None:
            return text_prefix(self._tokenizer), self.encode("\nAnswer:")
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": _HERE}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        before, _, after = text.partition(_HERE)
        return self.encode(before), self.encode(after)

    def prompt(
        self, length: int, facts: Sequence[tuple[float, str]], question: str, answer: str, rng: random.Random
    ) -> Prompt:
        """Lay facts into running text.

        Args:
            length: Tokens of the prompt.
            facts: Depth of each, from 0 (start) to 1 (end of the text), and its words.
            question: What is asked at the end.
            answer: What the reply must contain.
            rng: Chooses where in the text to begin.

        Raises:
            EvaluationError: The facts do not fit.
        """
        tail = self.encode("\n\n" + question) + self._after
        needles = sorted((depth, self.encode(" " + fact)) for depth, fact in facts)
        room = length - len(self._before) - len(tail) - sum(len(tokens) for _, tokens in needles)
        if room < 0:
            raise EvaluationError(f"length={length}: {len(facts)} facts and the question need {length - room} tokens")
        filler = self._filler(room, rng.randrange(len(self._sentences)))
        body: list[int] = []
        ends = [0, *accumulate(map(len, filler))]
        spots = [
            (min(range(len(ends)), key=lambda index: abs(ends[index] - depth * room)), tokens)
            for depth, tokens in needles
        ]
        for index, sentence in enumerate([*filler, []]):
            for spot, tokens in spots:
                body += tokens if spot == index else []
            body += sentence
        return Prompt([*self._before, *body, *tail], len(tail), answer)

    def _filler(self, room: int, start: int) -> list[list[int]]:
        """Sentences of `room` tokens in all; the last one is cut."""
        sentences: list[list[int]] = []
        while room:
            sentence = self._sentences[(start + len(sentences)) % len(self._sentences)][:room]
            sentences.append(sentence)
            room -= len(sentence)
        return sentences
