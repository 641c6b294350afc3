"""The demo: a Haystack pipeline from YAML chats through a compressed KV cache, and again through an uncompressed one.

    make demo

Two questions go through `pipelines/chat.yaml` on the embedded model: a capital, and a pass key hidden in a chapter of
Alice in Wonderland. Both are asked twice, once with the pipeline's own cache settings and once with the preset
"uncompressed", which is transformers' own cache. Everything printed is measured in this run. The exit status is 1 if an
answer is wrong or the cache of the long question is compressed less than 3.4 times.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haystack import Pipeline
from haystack.dataclasses import ChatMessage
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tokenizers import Tokenizer
from transformers.utils import logging

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples/tiny-model"
CONTEXT = 3072
"""Upper bound of the long prompt, in tokens."""
PASSKEY_SEED = 0
"""Picks the key, its place and where the text begins."""
LEAST_RATIO = 3.4


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        title: A name for the table.
        shown: What the terminal shows of the question.
        text: The whole prompt.
        answer: What a right reply contains.
    """

    title: str
    shown: str
    text: str
    answer: str


def load_module(path: Path) -> Any:
    """Import a script that is no part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def questions(count_tokens: Callable[[str], int]) -> list[Question]:
    """The capital of France, and the pass key in the chapter."""
    tasks = load_module(MODEL / "data.py")
    chapter = (ROOT / "examples/alice.txt").read_text()
    sample = tasks.passkey(CONTEXT, 1, PASSKEY_SEED, chapter, count_tokens)
    (message,) = sample.prompt()
    text = message["content"]
    question = text.rsplit("\n", 1)[-1]
    needle = text.index(sample.answer) / len(text)
    hidden = f"[{count_tokens(text)} tokens of Alice in Wonderland, a pass key at {needle:.0%} of it] {question}"
    capital = "What is the capital of France?"
    return [
        Question("short question", capital, capital, "Paris"),
        Question("pass key in a long text", hidden, text, sample.answer),
    ]


def load_pipeline(preset: str | None = None) -> Pipeline:
    """Read `pipelines/chat.yaml`.

    Args:
        preset: Replaces the cache settings of the file, and takes the live printing out. None: the file as it is.
    """
    pipeline = Pipeline.loads((ROOT / "pipelines/chat.yaml").read_text())
    if preset is None:
        return pipeline
    settings = pipeline.to_dict()
    settings["components"]["llm"]["init_parameters"] |= {"kv_cache": {"preset": preset}, "streaming_callback": None}
    return Pipeline.from_dict(settings)


def ask(pipeline: Pipeline, question: Question) -> ChatMessage:
    """One question, one reply."""
    (reply,) = pipeline.run({"prompt": {"question": question.text}})["llm"]["replies"]
    assert isinstance(reply, ChatMessage)
    return reply


def agreement(reply: ChatMessage, other: ChatMessage, tokenizer: Tokenizer) -> tuple[int, int]:
    """Tokens that two replies share from the start, and tokens of the longer one; the end of a reply counts as one."""
    ours, theirs = ([*tokenizer.encode(r.text or "").ids, r.meta["finish_reason"]] for r in (reply, other))
    same = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    return (min(len(ours), len(theirs)) if same is None else same), max(len(ours), len(theirs))


def compare(asked: list[Question], ours: list[ChatMessage], plain: list[ChatMessage], tokenizer: Tokenizer) -> Table:
    """Both runs of every question, side by side."""
    settings = ours[0].meta["turboquant"]["kv_cache"]
    kept = f"The first {settings['sink_length']} and the latest {settings['residual_length']} tokens at most"
    near = f"the {settings['near_length']} before them are kept at {settings['near_bits']} bits"
    table = Table(
        "",
        f"{settings['preset']} (K{settings['k_bits']} V{settings['v_bits']})",
        "uncompressed",
        caption=f"{kept} stay in the model's dtype, {near}, and all are counted: a short chat is no smaller.",
    )
    for question, reply, other in zip(asked, ours, plain, strict=True):
        same, tokens = agreement(reply, other, tokenizer)
        replies = (reply, other)
        sides = [r.meta["turboquant"] for r in replies]
        table.add_row(f"[bold]{escape(question.title)}[/bold]")
        table.add_row("reply", *(escape(r.text or "") for r in replies))
        table.add_row("prompt + reply tokens", *(f"{s['prompt_tokens']:,} + {s['completion_tokens']}" for s in sides))
        table.add_row("time to first token", *(f"{s['ttft']:.2f} s" for s in sides))
        table.add_row("tokens a second", *(f"{s['tokens_per_second']:.1f}" for s in sides))
        table.add_row("vram_bytes()", *(f"{s['vram_bytes']:,} B" for s in sides))
        table.add_row("uncompressed bytes", *(f"{s['uncompressed_bytes']:,} B" for s in sides))
        table.add_row("ratio", *(f"{s['compression_ratio']:.2f}x" for s in sides))
        table.add_row("same greedy tokens", f"{same} of {tokens}", "", end_section=True)
    return table


def faults(asked: list[Question], ours: list[ChatMessage], plain: list[ChatMessage]) -> list[str]:
    """What went wrong, in words."""
    wrong = [
        f"{side}: {question.title}: expected {question.answer!r} in {reply.text!r}"
        for side, replies in (("compressed", ours), ("uncompressed", plain))
        for question, reply in zip(asked, replies, strict=True)
        if question.answer not in (reply.text or "")
    ]
    ratio = ours[-1].meta["turboquant"]["compression_ratio"]
    if ratio < LEAST_RATIO:
        wrong.append(f"ratio {ratio:.2f}: expected {LEAST_RATIO} or more")
    return wrong


def main() -> int:
    """Ask, compare, judge."""
    os.chdir(ROOT)  # the pipeline names its model by a path in the project
    logging.disable_progress_bar()
    console = Console()
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    asked = questions(lambda text: len(tokenizer.encode(text).ids))
    pipeline, ours = load_pipeline(), []
    for question in asked:
        console.print(f"\n[bold]> {escape(question.shown)}[/bold]")
        ours.append(ask(pipeline, question))
    baseline = load_pipeline("uncompressed")
    plain = [ask(baseline, question) for question in asked]
    console.print(compare(asked, ours, plain, tokenizer))
    wrong = faults(asked, ours, plain)
    for fault in wrong:
        console.print(f"FAILED  {escape(fault)}", style="red")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
