"""Does the model still find things in a compressed cache? Passkeys and key-value pairs at lengths and depths."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from turboquant_local.engine.loading import LoadedModel
from turboquant_local.errors import EvaluationError
from turboquant_local.evaluation.codecs.base import KVCodec
from turboquant_local.evaluation.decoding import Prompt, decode
from turboquant_local.evaluation.haystack import Haystack
from turboquant_local.evaluation.words import WORDS

Task = Literal["passkey", "pairs", "list"]

TASKS: Final[tuple[Task, ...]] = get_args(Task)
LENGTHS: Final = (512, 1024, 2048, 4000)
DEPTHS: Final = (0.1, 0.3, 0.5, 0.7, 0.9)

_PAIRS: Final = 16
_LONGEST_LIST: Final = 64
_TOKENS_A_LINE: Final = 14
"""Generous: what a line of a list may take."""

_REPLY: Final = 24
"""Tokens of the longest reply."""


@dataclass(frozen=True)
class RetrievalCell:
    """Answers of one codec to prompts of one kind.

    Attributes:
        codec: Name of the codec.
        task: "passkey": one number in running text; "pairs": sixteen codes in running text, one asked; "list": a
            dense list of words and numbers behind running text, one asked.
        length: Tokens of a prompt.
        depth: Where the asked fact stands, from 0 (start) to 1 (end).
        correct: Replies that contain the number.
        total: Prompts.
    """

    codec: str
    task: Task
    length: int
    depth: float
    correct: int
    total: int


def make_prompts(
    haystack: Haystack, task: Task, length: int, depth: float, samples: int, seed: int = 0
) -> list[Prompt]:
    """Prompts of one kind; the same arguments give the same prompts.

    Raises:
        EvaluationError: The length is too small for the task, or there is no such task.
    """
    if task not in TASKS:
        raise EvaluationError(f"task={task!r}: expected one of {', '.join(TASKS)}")
    make = {"passkey": _passkey, "pairs": _pairs, "list": _list}[task]
    return [make(haystack, length, depth, random.Random(f"{task} {length} {depth} {seed} {i}")) for i in range(samples)]


def _number(rng: random.Random) -> str:
    return str(rng.randint(10_000, 99_999))


def _passkey(haystack: Haystack, length: int, depth: float, rng: random.Random) -> Prompt:
    number = _number(rng)
    fact = f"The pass key is {number}. Remember it. {number} is the pass key."
    return haystack.prompt(length, [(depth, fact)], "What is the pass key?", number, rng)


def _pairs(haystack: Haystack, length: int, depth: float, rng: random.Random) -> Prompt:
    words, numbers = rng.sample(WORDS, _PAIRS), rng.sample(range(10_000, 100_000), _PAIRS)
    depths = [depth, *((i + 0.5) / (_PAIRS - 1) for i in range(_PAIRS - 1))]
    facts = [
        (where, f"The code for {word} is {number}.") for where, word, number in zip(depths, words, numbers, strict=True)
    ]
    return haystack.prompt(length, facts, f"What is the code for {words[0]}?", str(numbers[0]), rng)


def _list(haystack: Haystack, length: int, depth: float, rng: random.Random) -> Prompt:
    entries = min(_LONGEST_LIST, length // 2 // _TOKENS_A_LINE)
    words, numbers = rng.sample(WORDS, entries), rng.sample(range(10_000, 100_000), entries)
    asked = round(depth * (entries - 1))
    lines = "\n".join(f"{word}: {number}" for word, number in zip(words, numbers, strict=True))
    question = f"What is the value of {words[asked]}?"
    return haystack.prompt(length, [(1.0, f"\n\nHere is a list:\n{lines}")], question, str(numbers[asked]), rng)


def measure_retrieval(
    loaded: LoadedModel,
    text: str,
    codecs: Sequence[KVCodec],
    *,
    tasks: Sequence[Task] = TASKS,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    samples: int = 10,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> list[RetrievalCell]:
    """Ask a model for facts in its compressed context. Put `UNCOMPRESSED` among the codecs for the baseline.

    Args:
        loaded: The model.
        text: Running text to hide facts in.
        codecs: What to measure.
        tasks: Kinds of prompts.
        lengths: Tokens of the prompts; the model's context must hold them and a short reply.
        depths: Where the asked fact stands.
        samples: Prompts of each kind, length and depth; they are decoded as one batch.
        seed: Other seeds give other prompts.
        on_progress: Called with a codec's name after each batch.

    Raises:
        EvaluationError: A length is too small for a task or too great for the model, or there is no such task.
    """
    if max(lengths, default=0) + _REPLY > loaded.context_length:
        raise EvaluationError(
            f"lengths={list(lengths)}: this model has a context of {loaded.context_length} tokens, and a reply takes "
            f"{_REPLY}; take shorter ones"
        )
    haystack = Haystack(loaded.tokenizer, text)
    cells = []
    for task in tasks:
        for length in lengths:
            for depth in depths:
                prompts = make_prompts(haystack, task, length, depth, samples, seed)
                for codec in codecs:
                    replies = decode(loaded, prompts, codec, max_new_tokens=_REPLY)
                    correct = sum(prompt.answer in reply for prompt, reply in zip(prompts, replies, strict=True))
                    cells.append(RetrievalCell(codec.name, task, length, depth, correct, samples))
                    if on_progress is not None:
                        on_progress(codec.name)
    return cells


def accuracy(cells: Iterable[RetrievalCell], codec: str) -> float:
    """Share of all prompts that a codec answered."""
    mine = [cell for cell in cells if cell.codec == codec]
    return sum(cell.correct for cell in mine) / sum(cell.total for cell in mine)
