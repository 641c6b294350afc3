"""What each codec costs a model: KL divergence and perplexity on WikiText-2 against bytes, in one table.

make quality
make quality ARGS="--windows 3 --codecs balanced compact balanced:k_bits=3,v_bits=2"
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from transformers.utils import logging

from turboquant_local.engine.loading import ModelSpec, acquire_model
from turboquant_local.evaluation import cut_windows, measure_fidelity, read_text
from turboquant_local.evaluation.codecs.registry import find_codec

ROOT = Path(__file__).parents[1]
CODECS = ("balanced", "compact", "extreme", "paper")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Quality of the presets and of other codecs.")
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-model"), help="a folder, or a name on the hub")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", type=Path, default=ROOT / "benchmarks/data/wikitext-2-valid.txt")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), help="names, or name:field=value,field=value")
    parser.add_argument("--window", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=int, help="most windows; the whole text without it")
    parser.add_argument("--context", type=int, default=512, help="first tokens of a window, which are not scored")
    parser.add_argument("--chunk", type=int, default=32, help="tokens fed at a time; 1 is decoding itself")
    parser.add_argument("--batch-size", type=int, default=1)
    options = parser.parse_args()

    logging.disable_progress_bar()
    loaded = acquire_model(ModelSpec(model=options.model, device=options.device, dtype=options.dtype))
    windows = cut_windows(loaded.tokenizer, read_text(options.text), options.window, limit=options.windows)
    codecs = [find_codec(text) for text in options.codecs]
    start = time.perf_counter()
    results = measure_fidelity(
        loaded.model,
        windows,
        codecs,
        context=options.context,
        chunk=options.chunk,
        batch_size=options.batch_size,
        on_progress=lambda name: print(".", end="", file=sys.stderr, flush=True),
    )
    seconds, perplexity = time.perf_counter() - start, results[0].reference_perplexity
    print(f"\n{len(windows)} windows, {seconds:.0f} s, uncompressed perplexity {perplexity:.4f}")
    head = f"{'codec':40s} {'ratio 4K':>8} {'KL mean':>8} {'median':>8} {'99.9 %':>8} {'top-1':>7} {'perplexity':>10}"
    print(f"{head}  95 %")
    for codec, result in zip(codecs, results, strict=True):
        config = loaded.model.config
        ratio = find_codec("uncompressed").stored_bytes(config, 4096) / codec.stored_bytes(config, 4096)
        interval = result.perplexity_interval
        bounds = "" if interval is None else f"{interval[0]:+.2%} to {interval[1]:+.2%}"
        print(
            f"{result.codec:40s} {ratio:8.2f} {result.kl_mean:8.5f} {result.kl_median:8.5f} {result.kl_tail:8.4f} "
            f"{result.top1_agreement:7.2%} {result.perplexity_change:+10.2%}  {bounds}"
        )


if __name__ == "__main__":
    main()
