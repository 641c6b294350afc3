"""Time the generation of a whole model on a CUDA device: tokens, first token, memory, for four ways of caching.

The model has the geometry of Llama-3.1-8B and random weights in bfloat16; prompts are random ids; batch 1, greedy.
Every way runs in one process on the same weights. Milliseconds a token are the mean over the tokens behind the twelfth,
as the host sees them come. Memory is the most allocated above the weights, during the whole and while decoding.
Rows go to benchmarks/results/generate.csv as they are measured.

Run: python benchmarks/generate.py [--out PATH] [--contexts 1024 32768 100000] [--ways NAME ...] [--layers N]
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu import machine, write_rows
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from turboquant_local import TurboQuantCache
from turboquant_local.engine.decode_loop import DecodeLoop, Read
from turboquant_local.engine.prefill import prefill
from turboquant_local.engine.sampling import Sampling

CONTEXTS = (1024, 32768, 100_000)
SKIPPED = 12  # tokens that still compile, capture or warm up
FIGURES = ("tokens", "first_token_s", "ms_a_token", "peak_gib", "peak_decoding_gib", "decoding")


class Clock(StoppingCriteria):
    """Notes when each token is known to the host."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()
        self.times: list[float] = []
        self.peak = 0

    def token(self, _: int) -> bool:
        """Note a token; it does not end the reply."""
        self.times.append(time.perf_counter())
        if len(self.times) == SKIPPED:  # what comes now is decoding alone
            self.peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        return False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """The same, as a criterion of `generate`."""
        self.token(int(input_ids[0, -1]))
        return torch.zeros(1, dtype=torch.bool, device=input_ids.device)

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


def llama(layers: int) -> LlamaForCausalLM:
    """Llama-3.1-8B, made on the device itself."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072,
        tie_word_embeddings=False, rms_norm_eps=1e-5, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model


def by_generate(model: LlamaForCausalLM, prompt: torch.Tensor, tokens: int, clock: Clock, **kwargs: Any) -> str:
    """Transformers' `generate`."""
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]), **kwargs,
    )  # fmt: skip
    return "eager"


def dynamic(model: LlamaForCausalLM, prompt: torch.Tensor, clock: Clock) -> str:
    """Transformers' default."""
    model.set_attn_implementation("sdpa")
    return by_generate(model, prompt, 32, clock, past_key_values=DynamicCache(config=model.config))


def static_compiled(model: LlamaForCausalLM, prompt: torch.Tensor, clock: Clock) -> str:
    """Compiled with CUDA graphs by `generate` itself."""
    model.set_attn_implementation("sdpa")
    by_generate(model, prompt, 64, clock, cache_implementation="static")
    return "compiled"


def ours_eager(model: LlamaForCausalLM, prompt: torch.Tensor, clock: Clock) -> str:
    """The compressed cache under `generate`; as in an engine, what ends up far is run first and alone."""
    cache = TurboQuantCache(model.config)
    if packed := cache.window_start(prompt.shape[1] - 1):
        prefill(model, cache, prompt[:, :packed], packed)
    return by_generate(model, prompt, 40, clock, past_key_values=cache)


def ours_graph(model: LlamaForCausalLM, prompt: torch.Tensor, clock: Clock) -> str:
    """What an engine does on a CUDA device. The time includes packing, every 32 tokens."""
    return by_graph(model, prompt, clock.token, "balanced", 172)


def by_graph(model: LlamaForCausalLM, prompt: torch.Tensor, read: Read, preset: str, tokens: int) -> str:
    """An engine's loop."""
    sampling = Sampling(GenerationConfig(max_new_tokens=tokens), LogitsProcessorList(), frozenset(), ())
    return DecodeLoop().run(model, TurboQuantCache(model.config, preset), prompt, sampling, read)


Way = Callable[[LlamaForCausalLM, torch.Tensor, Clock], str]
WAYS: dict[str, Way] = {
    "DynamicCache": dynamic,
    "turboquant eager": ours_eager,
    "turboquant": ours_graph,
    "StaticCache compiled": static_compiled,
}


def free() -> None:
    """Leave nothing behind for the next cell."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def measure(way: str, model: LlamaForCausalLM, context: int, weights: int) -> dict[str, object]:
    """One cell; an error takes the place of how it was decoded."""
    row: dict[str, object] = dict.fromkeys(FIGURES, "")
    prompt = torch.randint(0, 128_000, (1, context), device="cuda")
    try:
        clock = Clock()
        how = WAYS[way](model, prompt, clock)
        row = {**clock.figures(weights), "decoding": how}
    except Exception as error:  # one cell that fails must not lose the others
        row["decoding"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    free()
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
    model = llama(arguments.layers)
    torch.cuda.synchronize()
    weights = torch.cuda.memory_allocated()
    rows: list[dict[str, object]] = []
    for way in arguments.ways:
        measure(way, model, min(arguments.contexts), weights)  # what is compiled once a process
        for context in arguments.contexts:
            rows.append({**about, "way": way, "context": context, **measure(way, model, context, weights)})
            write_rows(arguments.out, rows)
            print(", ".join(f"{name} {rows[-1][name]}" for name in ("way", "context", *FIGURES)), flush=True)


if __name__ == "__main__":
    main()
