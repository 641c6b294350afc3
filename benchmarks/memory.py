"""Measure the memory of long contexts on a CUDA device: the most allocated above the weights, and what context fits.

The model and ways of generate.py. A prompt of random ids is prefilled and 8 tokens are decoded, by transformers'
`DynamicCache`, the prompt at once and in chunks, and by an engine's loop with each preset. The longest context within a
budget is sought from 5 % below what the line through the two longest measured ones says, 5 % shorter each time, with
the allocator held to the budget. Rows go to benchmarks/results/memory.csv, in place of older.

Run: python benchmarks/memory.py [--out PATH] [--contexts 8192 ...] [--budget GIB] [--ways NAME ...] [--layers N]
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch
import transformers
from gpu import machine, update_rows
from transformers import LlamaForCausalLM
from ways import WAYS, Way, llama

COMPARED = ("DynamicCache", "DynamicCache, prompt in chunks", "ours balanced", "ours compact", "ours extreme")
TOKENS = 8
STEP = 1024
"""The longest context is a multiple of this."""


def free() -> None:
    """Leave nothing behind for the next cell."""
    gc.collect()
    torch.cuda.empty_cache()


def peak(way: Way, model: LlamaForCausalLM, context: int) -> int:
    """Most bytes allocated above the weights."""
    prompt = torch.randint(0, 128_000, (1, context), device="cuda")
    free()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    way(model, prompt, TOKENS, lambda _: False)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def longest(peaks: dict[int, int], budget: float) -> int:
    """5 % less than the context whose peak is the budget, on the line through the two longest measured ones."""
    (short, low), (long, high) = sorted(peaks.items())[-2:]
    return int((long + (budget - high) * (long - short) / (high - low)) * 0.95) // STEP * STEP


def main() -> None:
    """Measure every cell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.csv")
    parser.add_argument("--contexts", type=int, nargs="+", default=(8192, 16_384, 32_768, 65_536))
    parser.add_argument("--budget", type=float, default=8.0, help="GiB above the weights")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=COMPARED)
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    about = {**machine(), "transformers": transformers.__version__, "layers": arguments.layers}
    # Memory that can grow in place is not lost to blocks that are a little too small, which would count in a budget.
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    model = llama(arguments.layers)
    weights, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory

    def add(way: str, context: int, budget: float | str) -> int:
        outcome, most = "fits", 0
        try:
            most = peak(WAYS[way], model, context)
        except torch.cuda.OutOfMemoryError:
            outcome = "out of memory"
        gib = f"{most / 2**30:.2f}" if most else ""
        row = {**about, "way": way, "context": context, "peak_gib": gib, "budget_gib": budget, "outcome": outcome}
        update_rows(arguments.out, [row], ("layers", "way", "context", "budget_gib"))
        print(f"{way:<31}{context:>8} tokens {gib:>7} GiB above the weights; {outcome} {budget}", flush=True)
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
