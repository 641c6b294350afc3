"""What constrained decoding costs: tokens a second of free and of constrained replies, in turns, on one model.

"cost" compares the two on the wall clock, which a busy machine disturbs; "added work" is the processor time spent in
the grammar and its mask over that of all the rest.

    .venv/bin/python benchmarks/constrained.py --repeats 5

The model is random and far smaller than any that is used, so that the grammar's share of a token's time is larger than
it would be elsewhere; its vocabulary has 32,000 tokens. Rows go to benchmarks/results/constrained.csv.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import machine
from rich.console import Console
from rich.table import Table
from transformers.utils import logging
from vocabulary import make_tokenizer

from turboquant_local.engine import ChatEngine, GenerationOptions, Message, Tool
from turboquant_local.engine.grammar import Constraint
from turboquant_local.testing import tiny_model

ROOT = Path(__file__).parents[1]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["author", "editor", "reader"]},
        "notes": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 4},
        "address": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[A-Z][a-z]+ [0-9]{1,4}$"}]},
    },
    "required": ["name", "age", "role", "notes", "address"],
}
# So many that no reply comes to its end: both sides generate the same number of tokens.
PEOPLE = {"type": "array", "items": PERSON, "minItems": 1000}
HIRE = Tool("hire", "Hire people", {"type": "object", "properties": {"people": PEOPLE}, "required": ["people"]})
SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"schema": PEOPLE}}}
CASES: dict[str, tuple[list[Tool], dict[str, object]]] = {
    "schema": ([], {**SCHEMA}),
    "call": ([HIRE], {"tool_choice": "required"}),
    "call or schema": ([HIRE], {**SCHEMA}),
}
MODES: dict[str, dict[str, object]] = {"greedy": {"do_sample": False}, "sampled": {"temperature": 1.0, "seed": 1}}


class Stopwatch:
    """Adds up the processor time that constrained decoding itself takes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("__call__", "accept"):
            setattr(Constraint, name, self._timed(getattr(Constraint, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.thread_time()
            result = method(*arguments)
            self.seconds += time.thread_time() - start
            return result

        return timed


def speed(engine: ChatEngine, tools: list[Tool], tokens: int, options: dict[str, object]) -> tuple[float, float]:
    """Tokens a second of one reply (decode only), and its processor time in seconds."""
    chosen = GenerationOptions(max_new_tokens=tokens, **options)  # type: ignore[arg-type]
    start = time.process_time()
    reply = engine.chat([Message("user", "Write.")], tools=tools, options=chosen)
    processor = time.process_time() - start
    if reply.usage.completion_tokens != tokens:
        sys.exit(f"{options}: the reply ended before {tokens} tokens; nothing to compare")
    return reply.metrics.tokens_per_second, processor


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="What constrained decoding costs on a CPU.")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each reply")
    parser.add_argument("--repeats", type=int, default=25, help="2 or more")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/constrained.csv")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error(f"--repeats {arguments.repeats}: expected 2 or more, for percentiles")
    logging.disable_progress_bar()
    console = Console(width=120)

    rows: list[list[Any]] = []
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, console.status("making a tokenizer and a model"):
        size = arguments.hidden_size
        model = tiny_model("llama", vocab_size=arguments.vocabulary, hidden_size=size, intermediate_size=4 * size)
        parameters = sum(weights.numel() for weights in model.parameters())
        model.save_pretrained(folder)
        make_tokenizer(arguments.vocabulary).save_pretrained(folder)
        with ChatEngine(folder, device="cpu", kv_cache="uncompressed") as engine:
            for mode, how in MODES.items():
                for name, (tools, asked) in CASES.items():
                    rates: list[tuple[float, float]] = []
                    shares: list[float] = []
                    for turn in range(arguments.repeats + 1):
                        # In turns and in both orders, so that a busy moment of the machine falls on both alike.
                        figures = [(0.0, 0.0), (0.0, 0.0)]
                        for side in (0, 1) if turn % 2 else (1, 0):
                            watch.seconds = 0.0
                            figures[side] = speed(engine, tools, arguments.tokens, how | (asked if side else {}))
                            if side and turn:  # the first round warms up
                                shares.append(100 * watch.seconds / (figures[side][1] - watch.seconds))
                        rates.extend([(figures[0][0], figures[1][0])] if turn else [])
                    for metric, unit, values in (
                        ("free", "tokens/s", [free for free, _ in rates]),
                        ("constrained", "tokens/s", [held for _, held in rates]),
                        ("cost", "%", [100 * (1 - held / free) for free, held in rates]),
                        ("added processor time", "%", shares),
                    ):
                        cuts = statistics.quantiles(values, n=10, method="inclusive")
                        rows.append([mode, name, metric, unit, len(values), cuts[1], cuts[4], cuts[7]])

    view = Table(title=f"tokens a second, medians of {arguments.repeats}; {parameters / 1e6:.0f} M parameters")
    for column in ("mode", "form", "free", "constrained", "cost", "added work"):
        view.add_column(column, justify="right")
    for start in range(0, len(rows), 4):
        free_rate, held_rate, *costs = (row[-3:] for row in rows[start : start + 4])
        shown = [f"{p50:.1f} % ({p20:.1f} to {p80:.1f})" for p20, p50, p80 in costs]
        view.add_row(str(rows[start][0]), str(rows[start][1]), f"{free_rate[1]:.1f}", f"{held_rate[1]:.1f}", *shown)
    console.print(view)
    conditions = {**machine(), "llguidance": importlib.metadata.version("llguidance")}
    console.print(", ".join(f"{name} {value}" for name, value in conditions.items()), style="dim", highlight=False)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = ("vocabulary", "parameters", "tokens", "mode", "form", "metric", "unit", "n", "p20", "p50", "p80")
        writer.writerow([*conditions, *names])
        for row in rows:
            shown_row = (f"{value:.6g}" if isinstance(value, float) else value for value in row)
            writer.writerow([*conditions.values(), arguments.vocabulary, parameters, arguments.tokens, *shown_row])
    console.print(f"Rows: {os.path.relpath(arguments.out)}")


if __name__ == "__main__":
    main()
