"""Memory and speed of the presets on a CPU, against transformers' own cache, on the embedded model.

    make bench
    make bench ARGS="--presets balanced --contexts 1000 --repeats 3"

Every run first checks that the identity codec gives the greedy tokens of `DynamicCache`, and measures nothing if it
does not. Rows go to benchmarks/results/cpu.csv. On a CPU, packed tokens are read by
the reference implementation in plain torch, which is written to be right before it is fast; `make bench-gpu` times the
kernel that reads them on a GPU.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from dataclasses import astuple, dataclass, fields
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.utils import logging

from turboquant_local import TurboQuantCache
from turboquant_local.testing import reachable_bytes

ROOT = Path(__file__).parents[1]
BASELINE = "DynamicCache"
PRESETS = (BASELINE, "identity", "balanced", "compact", "extreme", "paper")
PACKAGES = ("torch", "transformers", "turboquant-local")


@dataclass(frozen=True)
class Samples:
    """What one preset at one context length gave.

    Attributes:
        prefill: Seconds from the prompt to the first token, one value a repeat.
        decode: Seconds of each later token.
        stored: Bytes of the cache at the end.
        uncompressed: Bytes of `DynamicCache` for the same tokens.
        tokens: The generated ids.
    """

    prefill: list[float]
    decode: list[float]
    stored: int
    uncompressed: int
    tokens: list[int]


@dataclass(frozen=True)
class Row:
    """One metric of one preset at one context length: percentiles over `n` values."""

    preset: str
    context: int
    metric: str
    unit: str
    n: int
    p20: float
    p50: float
    p80: float


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: torch.Tensor, preset: str, new_tokens: int) -> Samples:
    """Greedy decoding, one forward call a token, each timed."""
    cache: DynamicCache
    if preset == BASELINE:
        model.set_attn_implementation("sdpa")
        cache = DynamicCache(config=model.config)
    else:
        cache = TurboQuantCache(model.config, preset)
    times, tokens, step = [], [], prompt
    for _ in range(new_tokens):
        start = time.perf_counter()
        logits = model(step, past_key_values=cache, logits_to_keep=1).logits
        step = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(step))
        times.append(time.perf_counter() - start)
    if isinstance(cache, TurboQuantCache):
        stored, uncompressed = cache.vram_bytes(), cache.uncompressed_bytes()
    else:
        stored = uncompressed = reachable_bytes(cache)
    return Samples(times[:1], times[1:], stored, uncompressed, tokens)


def check(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    """Refuse to measure a cache that is wrong."""
    want = generate(model, prompt, BASELINE, 16).tokens
    got = generate(model, prompt, "identity", 16).tokens
    if got != want:
        sys.exit(f"the identity codec gives {got}, DynamicCache {want}: nothing is measured until they agree")


def machine() -> dict[str, object]:
    """What the figures depend on; never who or where."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu or "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name.replace("-", "_"): importlib.metadata.version(name) for name in PACKAGES},
    }


def rows(preset: str, context: int, samples: list[Samples]) -> list[Row]:
    """One row a metric."""
    values: dict[tuple[str, str], list[float]] = {
        ("ttft", "s"): [x for sample in samples for x in sample.prefill],
        ("decode", "ms/token"): [1000 * x for sample in samples for x in sample.decode],
        ("stored", "bytes"): [sample.stored for sample in samples],
        ("uncompressed", "bytes"): [sample.uncompressed for sample in samples],
        ("ratio", "x"): [sample.uncompressed / sample.stored for sample in samples],
    }
    found = []
    for (metric, unit), numbers in values.items():
        # A single value is every percentile of itself.
        cuts = statistics.quantiles(numbers, n=10, method="inclusive") if len(numbers) > 1 else numbers * 9
        found.append(Row(preset, context, metric, unit, len(numbers), cuts[1], cuts[4], cuts[7]))
    return found


def table(found: list[Row], new_tokens: int) -> Table:
    """The medians, one line a preset and context."""
    view = Table(title=f"medians; {new_tokens} tokens generated after each prompt")
    for name in ("tokens", "cache", "stored", "plain", "ratio", "ttft s", "ms/token"):
        view.add_column(name, justify="left" if name == "cache" else "right", no_wrap=True)
    median = {(row.context, row.preset, row.metric): row.p50 for row in found}
    for context, preset in dict.fromkeys((row.context, row.preset) for row in found):
        stored, plain = (median[context, preset, metric] / 2**20 for metric in ("stored", "uncompressed"))
        ratio, ttft, decode = (median[context, preset, metric] for metric in ("ratio", "ttft", "decode"))
        sizes = (f"{stored:.2f} MiB", f"{plain:.2f} MiB", f"{ratio:.2f}x")
        view.add_row(str(context), preset, *sizes, f"{ttft:.2f}", f"{decode:.1f}")
    return view


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Memory and speed of the presets on a CPU.")
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-model"), help="a folder, or a name on the hub")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--contexts", nargs="+", type=int, default=[500, 1000, 2000, 4000], help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cpu.csv")
    options = parser.parse_args()

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    text = tokenizer((ROOT / "examples/alice.txt").read_text(), return_tensors="pt").input_ids
    text = text.repeat(1, -(-max(options.contexts) // text.shape[1]))
    check(model, text[:, :300])

    found: list[Row] = []
    console = Console()
    with console.status("measuring") as status:
        for context in options.contexts:
            prompt = text[:, :context]
            samples: dict[str, list[Samples]] = {preset: [] for preset in options.presets}
            # In turns, so that a busy moment of the machine falls on all alike; the first round warms up.
            for turn, preset in product(range(options.repeats + 1), options.presets):
                status.update(f"measuring {preset} at {context} tokens, {turn} of {options.repeats}")
                sample = generate(model, prompt, preset, options.new_tokens if turn else 2)
                samples[preset] += [sample] if turn else []
            for preset in options.presets:
                found += rows(preset, context, samples[preset])
    console.print(table(found, options.new_tokens))
    conditions = machine()
    console.print(", ".join(f"{name} {value}" for name, value in conditions.items()), style="dim", highlight=False)
    console.print("Measured on the CPU; make bench-gpu measures on a GPU.", style="dim")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*conditions, "model", *(field.name for field in fields(Row))])
        for row in found:
            figures = (f"{value:.8g}" if isinstance(value, float) else value for value in astuple(row))
            writer.writerow([*conditions.values(), Path(options.model).name, *figures])
    console.print(f"Rows: {os.path.relpath(options.out)}")


if __name__ == "__main__":
    main()
