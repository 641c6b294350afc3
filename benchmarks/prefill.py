"""Time to first token on a CUDA device: a compressed cache against transformers' own, in the same run.

The model has the geometry of Llama-3.1-8B and random weights in bfloat16; the time stops when the prompt's first token
is known. A preset's name stands for one call of the model, "engine" for an engine's loop with `balanced`, which takes
the prompt in parts and pieces. The caches take turns; medians, and apart from them the first call of a length in this
process, which may plan and compile. Rows go to benchmarks/results/prefill.csv.

Run: python benchmarks/prefill.py [--layers N] [--contexts N ...] [--caches NAME ...] [--out PATH]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from gpu import machine, write_rows
from transformers import Cache, DynamicCache, LlamaForCausalLM
from ways import llama, ours

from turboquant_local import TurboQuantCache

CONTEXTS = (1024, 8192, 32768)
PRESETS = ("balanced", "compact", "extreme")
CACHES = (*PRESETS, "engine")
REPEATS = 3


def first_token(model: LlamaForCausalLM, ids: torch.Tensor, cache: Cache) -> float:
    """Seconds from the call to the token."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax().item()
    return time.perf_counter() - start


def engine_first_token(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """The same by an engine's loop; the reply ends there, before its steps would be captured."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    ours("balanced")(model, ids, 32, lambda _: True)
    return time.perf_counter() - start


def main() -> None:
    """Measure all points, print a table and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES, help="DynamicCache always runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "prefill.csv")
    options = parser.parse_args()
    where, rows = machine(), []
    model = llama(options.layers)
    for context in options.contexts:
        ids = torch.randint(0, 128256, (1, context), generator=torch.Generator().manual_seed(0)).cuda()
        times: dict[str, list[float]] = {name: [] for name in ("DynamicCache", *options.caches)}
        for _ in range(REPEATS + 1):
            for name, taken in times.items():
                if name == "engine":
                    taken.append(engine_first_token(model, ids))
                    continue
                fresh = name == "DynamicCache"
                cache = DynamicCache(config=model.config) if fresh else TurboQuantCache(model.config, name)
                taken.append(first_token(model, ids, cache))
                del cache
        base = median(times["DynamicCache"][1:])
        for name, (first, *taken) in times.items():
            rows.append({
                **where, "layers": options.layers, "context": context, "cache": name,
                "ttft_ms_first": f"{first * 1e3:.1f}",
                "ttft_ms_min": f"{min(taken) * 1e3:.1f}", "ttft_ms_median": f"{median(taken) * 1e3:.1f}",
                "ttft_ms_max": f"{max(taken) * 1e3:.1f}", "ratio": f"{median(taken) / base:.3f}",
            })  # fmt: skip
            print(
                f"{context:>6} {name:<13} {median(taken) * 1e3:8.1f} ms {rows[-1]['ratio']} of DynamicCache", flush=True
            )
    write_rows(options.out, rows)


if __name__ == "__main__":
    main()
