"""Measure the memory of long contexts on a CUDA device: the most allocated above the weights, and what context fits.

The model of generate.py. A prompt of random ids is prefilled and 8 tokens are decoded, by transformers' `DynamicCache`
and by an engine's loop with each preset. The longest context within a budget is read off the line through the two
longest measured ones and run with the allocator held to the budget; where that fails, one 5 % shorter, and so on.
Rows go to benchmarks/results/memory.csv.

Run: python benchmarks/memory.py [--out PATH] [--contexts 8192 65536 100000] [--budget GIB] [--layers N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from generate import by_graph, free, llama
from gpu import machine, write_rows
from transformers import DynamicCache, LlamaForCausalLM

TOKENS = 8
STEP = 1024
"""The longest context is a multiple of this."""

Way = Callable[[LlamaForCausalLM, torch.Tensor], object]


def dynamic(model: LlamaForCausalLM, prompt: torch.Tensor) -> object:
    """Transformers' default."""
    model.set_attn_implementation("sdpa")
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False,
        past_key_values=DynamicCache(config=model.config),
    )  # fmt: skip


def ours(preset: str) -> Way:
    """What an engine does."""
    return lambda model, prompt: by_graph(model, prompt, lambda _: False, preset, TOKENS)


WAYS: dict[str, Way] = {"DynamicCache": dynamic, **{name: ours(name) for name in ("balanced", "compact", "extreme")}}


def peak(way: Way, model: LlamaForCausalLM, context: int) -> int:
    """Most bytes allocated above the weights."""
    prompt = torch.randint(0, 128_000, (1, context), device="cuda")
    free()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    way(model, prompt)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def longest(peaks: dict[int, int], budget: float) -> int:
    """The context whose peak is the budget, on the line through the two longest measured ones."""
    (short, low), (long, high) = sorted(peaks.items())[-2:]
    return int((long + (budget - high) * (long - short) / (high - low)) // STEP * STEP)


def main() -> None:
    """Measure every cell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.csv")
    parser.add_argument("--contexts", type=int, nargs="+", default=(8192, 65_536, 100_000))
    parser.add_argument("--budget", type=float, default=8.0, help="GiB above the weights")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    about = {**machine(), "transformers": transformers.__version__, "layers": arguments.layers}
    model = llama(arguments.layers)
    weights, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    rows = []

    def add(way: str, context: int, budget: float | str) -> int:
        outcome, most = "fits", 0
        try:
            most = peak(WAYS[way], model, context)
        except torch.cuda.OutOfMemoryError:
            outcome = "out of memory"
        gib = f"{most / 2**30:.2f}" if most else ""
        row = {**about, "way": way, "context": context, "peak_gib": gib, "budget_gib": budget, "outcome": outcome}
        rows.append(row)
        write_rows(arguments.out, rows)
        print(f"{way:<14}{context:>8} tokens {gib:>7} GiB above the weights; {outcome} {budget}", flush=True)
        return most

    for way in arguments.ways:
        peaks = {context: add(way, context, "") for context in arguments.contexts}
        context, most = longest(peaks, arguments.budget * 2**30), 0
        while not most and context > STEP:
            free()
            torch.cuda.set_per_process_memory_fraction((weights + arguments.budget * 2**30) / total)
            most = add(way, context, arguments.budget)
            context = int(context * 0.95) // STEP * STEP
        torch.cuda.set_per_process_memory_fraction(1.0)


if __name__ == "__main__":
    main()
