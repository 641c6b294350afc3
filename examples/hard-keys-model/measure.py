"""Perplexity and KL divergence of this model through the real cache, preset by preset.

    python measure.py --text FILE --windows 8 --length 2048
    python measure.py --text FILE --windows 3 --length 1536 --move 20

`--move` puts the biases in rotary pairs that are so many places faster, and silences the queries there and where they
were: the uncompressed model does not feel them, a codec does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from turboquant_local import TurboQuantCache

HERE = Path(__file__).resolve().parent

CACHES: dict[str, dict[str, Any]] = {
    "paper, 4 bits": {"preset": "paper"},
    "paper, 3 bits": {"preset": "paper", "k_bits": 3, "v_bits": 3},
    "paper, 3 bits, center_keys": {"preset": "paper", "k_bits": 3, "v_bits": 3, "center_keys": True},
    "compact without center_keys": {"preset": "compact", "center_keys": False},
    "compact without error_feedback": {"preset": "compact", "error_feedback": False},
    "turboquant_k8v4": {"preset": "turboquant_k8v4"},
    "balanced": {"preset": "balanced"},
    "compact": {"preset": "compact"},
    "extreme": {"preset": "extreme"},
}


@torch.no_grad()
def move_biases(model: Qwen2ForCausalLM, places: int) -> None:
    """Change the model's biases as `--move` says."""
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention = layer.self_attn
        bias = attention.k_proj.bias.view(config.num_key_value_heads, -1)
        weight = attention.q_proj.weight.view(*bias.shape[:1], group, bias.shape[1], -1)
        query_bias = attention.q_proj.bias.view(*bias.shape[:1], group, -1)
        for head, channel in bias.nonzero().tolist():
            for silent in (channel, channel - places):
                weight[head, :, silent], query_bias[head, :, silent] = 0, 0
        bias.copy_(bias.roll(-places, dims=1))


@torch.no_grad()
def log_probabilities(
    model: Qwen2ForCausalLM, rows: torch.Tensor, kv_cache: dict[str, Any], chunk: int
) -> torch.Tensor:
    """Of every next token, `[windows, length - 1, vocabulary]`, in chunks through the cache."""
    cache = TurboQuantCache(model.config, kv_cache)
    pieces = [model(ids, past_key_values=cache, use_cache=True).logits.float() for ids in rows.split(chunk, dim=1)]
    return torch.cat(pieces, 1)[:, :-1].log_softmax(-1)


def main() -> None:
    """Print a line for each cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=32, help="tokens a step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--move", type=int, default=0, metavar="PLACES")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.bfloat16).eval().to(options.device)
    if options.move:
        move_biases(model, options.move)
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    each = options.length - 1
    rows = torch.tensor([[0, *ids[i * each : (i + 1) * each]] for i in range(options.windows)]).to(options.device)

    def perplexity(log_p: torch.Tensor) -> float:
        return float((-log_p.gather(-1, rows[:, 1:, None])).mean().exp())

    wanted = log_probabilities(model, rows, {"preset": "uncompressed"}, options.chunk)
    base = perplexity(wanted)
    print(f"{'uncompressed':30} perplexity {base:7.2f}")
    for name in options.caches:
        got = log_probabilities(model, rows, CACHES[name], options.chunk)
        divergence = (wanted.exp() * (wanted - got)).sum(-1).mean().item()
        here = perplexity(got)
        print(f"{name:30} perplexity {here:7.2f} ({here / base - 1:+.2%})  mean KL {divergence:.5f}", flush=True)


if __name__ == "__main__":
    main()
