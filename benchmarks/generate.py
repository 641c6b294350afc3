"""Time the generation of a whole model on a CUDA device: tokens, first token, memory, by the ways of ways.py.

The model has the geometry of Llama-3.1-8B and random weights in bfloat16; prompts are random ids; batch 1, greedy.
Every way has a process of its own and runs once at each length to warm up. Milliseconds a token are the mean over the
tokens behind the twelfth, as the host sees them come. Memory is the most allocated above the weights, during the whole
and while decoding. Rows go to benchmarks/results/generate.csv as they are measured, in place of older ones.

Run: python benchmarks/generate.py [--out PATH] [--contexts 1024 32768 100000] [--ways NAME ...] [--layers N]
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from gpu import machine, update_rows
from transformers import LlamaForCausalLM
from ways import WAYS, llama

CONTEXTS = (1024, 32768, 100_000)
SKIPPED = 12  # tokens that still compile, capture or warm up
TOKENS = {"ours": 172, "StaticCache": 64}
"""New tokens by the first word of a way, so that ours include packing, which comes every 32."""
FIGURES = ("tokens", "first_token_s", "ms_a_token", "peak_gib", "peak_decoding_gib", "decoding")


class Clock:
    """Notes when each token is known to the host."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()
        self.times: list[float] = []
        self.peak = 0

    def read(self, _: int) -> bool:
        """Note a token; it does not end the reply."""
        self.times.append(time.perf_counter())
        if len(self.times) == SKIPPED:  # what comes now is decoding alone
            self.peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        return False

    def figures(self, weights: int) -> dict[str, object]:
        """What a row tells; `weights` are the bytes of the model."""
        decoding = torch.cuda.max_memory_allocated()
        behind = self.times[SKIPPED - 1 :]
        return {
            "tokens": len(self.times),
            "first_token_s": f"{self.times[0] - self.start:.3f}",
            "ms_a_token": f"{(behind[-1] - behind[0]) / (len(behind) - 1) * 1e3:.2f}",
            "peak_gib": f"{(max(self.peak, decoding) - weights) / 2**30:.2f}",
            "peak_decoding_gib": f"{(decoding - weights) / 2**30:.2f}",
        }


def measure(way: str, model: LlamaForCausalLM, context: int, weights: int) -> dict[str, object]:
    """One cell; an error takes the place of how it was decoded."""
    row: dict[str, object] = {}
    prompt = torch.randint(0, 128_000, (1, context), device="cuda")
    try:
        for _ in range(2):  # the first compiles, and lets cuDNN choose how
            gc.collect()
            torch.cuda.empty_cache()
            clock = Clock()
            how = WAYS[way](model, prompt, TOKENS.get(way.split()[0], 32), clock.read)
            row = {**clock.figures(weights), "decoding": how}
    except Exception as error:  # one cell that fails must not lose the others
        row = {**dict.fromkeys(FIGURES, ""), "decoding": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    torch._dynamo.reset()
    return row


def main() -> None:
    """Measure every cell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "generate.csv")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    about = {**machine(), "transformers": transformers.__version__, "layers": arguments.layers}
    if len(arguments.ways) > 1:
        shared = ["--out", arguments.out, "--layers", arguments.layers, "--contexts", *arguments.contexts]
        for way in arguments.ways:
            subprocess.run([sys.executable, __file__, "--ways", way, *map(str, shared)], check=False)
        return
    [way] = arguments.ways
    model = llama(arguments.layers)
    torch.cuda.synchronize()
    weights = torch.cuda.memory_allocated()
    for context in sorted(arguments.contexts):  # a shorter one would get the static cache of a longer one
        row = {**about, "way": way, "context": context, **measure(way, model, context, weights)}
        update_rows(arguments.out, [row], ("layers", "way", "context"))
        print(", ".join(f"{name} {row[name]}" for name in ("way", "context", *FIGURES)), flush=True)


if __name__ == "__main__":
    main()
