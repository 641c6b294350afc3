"""Make the hard-keys model: a three-layer Qwen2 with large biases on its keys, distilled from examples/tiny-model.

    python train.py --out .

Nothing but the tiny model and what lies beside it is read. The tiny model writes the running text; its task generators
hide needles in that text and make chats, tool calls and JSON; the student learns the teacher's distribution of every
next token.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "tiny-model"

LAYERS = (0, 4, 7)
"""Layers of the tiny model that the student's three start from."""

BIASED_PAIRS = ((63, 61), (62, 60, 58))
"""Rotary pairs (i, i + 64) that carry a key head's bias: slow ones, which turn by 0.05 to 0.12 rad in 4,096 tokens."""

BIAS_NORMS = ((240.0, 320.0), (160.0, 240.0), (320.0, 200.0))
"""Norm of the bias by layer and key head; without it a key's norm is about 15."""

MIX = (0.5, 0.25)
"""Shares of rows that are running text, and needles in running text; the rest is chat, tools, lists and JSON."""


def tiny_training() -> ModuleType:
    """The tiny model's own train.py, whose `Packer` makes rows of training data."""
    sys.path.insert(0, str(TINY))
    spec = importlib.util.spec_from_file_location("tiny_train", TINY / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def make_student(teacher: PreTrainedModel, ids: torch.Tensor) -> Qwen2ForCausalLM:
    """A Qwen2 of three of the teacher's layers, in float32, with the biases in place.

    Qwen2 normalises neither queries nor keys: the weights of these norms and the mean of 1 / rms, taken on `ids`
    (`[batch, length]`), go into the projections.
    """
    given = teacher.config
    copied = (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "pad_token_id",
        "eos_token_id",
    )  # fmt: skip
    config = Qwen2Config(**{name: getattr(given, name) for name in copied}, num_hidden_layers=len(LAYERS))
    student = Qwen2ForCausalLM(config).to(ids.device)
    hidden = teacher(ids, output_hidden_states=True).hidden_states
    source = teacher.state_dict()
    target = student.state_dict()
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        target[name].copy_(source[name])
    for index, layer in enumerate(LAYERS):
        for name in target:
            if name.startswith(f"model.layers.{index}.") and not name.endswith("bias"):
                target[name].copy_(source[name.replace(f".{index}.", f".{layer}.", 1)])
        block, attention = teacher.model.layers[layer], student.model.layers[index].self_attn
        x = block.input_layernorm(hidden[layer])
        for side in ("q", "k"):
            projection = getattr(attention, f"{side}_proj")
            heads = getattr(block.self_attn, f"{side}_proj")(x).float().unflatten(-1, (-1, given.head_dim))
            norm = getattr(block.self_attn, f"{side}_norm").weight.float()
            inverse_rms = heads.square().mean(-1).rsqrt().mean((0, 1))
            projection.weight.mul_((inverse_rms[:, None] * norm).flatten()[:, None])
            projection.bias.zero_()
        attention.v_proj.bias.zero_()
        attention.k_proj.bias.copy_(key_bias(index, given.head_dim))
    return student


def key_bias(layer: int, head_dim: int) -> torch.Tensor:
    """The bias of one layer's keys, `[num_kv_heads * head_dim]`: equal parts in the slow pairs, at random angles."""
    generator = torch.Generator().manual_seed(layer)
    bias = torch.zeros(len(BIASED_PAIRS), head_dim)
    for head, (pairs, norm) in enumerate(zip(BIASED_PAIRS, BIAS_NORMS[layer], strict=True)):
        for pair in pairs:
            angle = torch.rand((), generator=generator) * 2 * torch.pi
            size = norm / len(pairs) ** 0.5
            bias[head, pair], bias[head, pair + head_dim // 2] = size * angle.cos(), size * angle.sin()
    return bias.flatten()


@torch.no_grad()
def sample_text(teacher: PreTrainedModel, count: int, length: int) -> np.ndarray:
    """Running text in the teacher's words: token ids, `[count * length]` uint16. Id 0 parts documents."""
    start = torch.zeros(count, 1, dtype=torch.long, device=teacher.device)
    teacher.generation_config.eos_token_id = None
    ids = teacher.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=length - 1,
    )  # fmt: skip
    return ids.cpu().numpy().astype(np.uint16).ravel()


def pack_rows(arguments: tuple[np.ndarray, int, int]) -> np.ndarray:
    """Rows of 4,097 tokens, `[count, 4097]`, out of running text, a count and a seed."""
    from tokenizers import Tokenizer

    text, count, seed = arguments
    packer = tiny_training().Packer(Tokenizer.from_file(str(TINY / "tokenizer.json")), text, seed, MIX)
    return np.stack([packer.row(1.0)[0] for _ in range(count)])


def divergence(teacher: PreTrainedModel, student: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Mean KL divergence of the student's next-token distribution from the teacher's, in nats."""
    with torch.no_grad():
        wanted = teacher(ids).logits.float().log_softmax(-1).flatten(0, 1)
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = student(ids).logits
    return torch.nn.functional.kl_div(
        logits.float().log_softmax(-1).flatten(0, 1), wanted, reduction="batchmean", log_target=True
    )


def distil(
    teacher: PreTrainedModel,
    student: Qwen2ForCausalLM,
    rows: np.ndarray,
    seconds: float,
    batch: int,
    rates: list[float],
) -> None:
    """Train for so many seconds, the learning rate falling to 0; the key biases stay as they are."""
    matrices, others = [], []
    for name, parameter in student.named_parameters():
        if name.endswith("k_proj.bias"):
            parameter.requires_grad_(False)
        else:
            (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    optimizers = [
        torch.optim.Muon(matrices, lr=rates[0], weight_decay=0.1),
        torch.optim.AdamW(others, lr=rates[1], betas=(0.9, 0.95), weight_decay=0.0),
    ]
    order = np.random.default_rng(0)
    begin, step, done = time.time(), 0, 0.0
    while done < 1:
        chosen = order.choice(len(rows), batch, replace=False)
        ids = torch.from_numpy(rows[chosen, :-1].astype(np.int64)).to(student.device)
        loss = divergence(teacher, student, ids)
        loss.backward()
        done = (time.time() - begin) / seconds
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 50) * min(1.0, max(0.0, 1 - done) / 0.7)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0:
            print(f"step {step}: {time.time() - begin:.0f} s, KL {loss.item():.4f}", flush=True)
    print(f"{step} steps of {batch * (rows.shape[1] - 1):,} tokens", flush=True)


def main() -> None:
    """Sample, pack, distil, save in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=80, help="of training, after the data are made")
    parser.add_argument("--documents", type=int, default=2048, help="sampled from the teacher")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each")
    parser.add_argument("--rows", type=int, default=8000, help="of 4,096 tokens to train on, each seen several times")
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--rates", type=float, nargs=2, default=[0.01, 0.001], help="of Muon and AdamW")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.manual_seed(0)
    begin = time.time()
    teacher = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY)

    sampled = sample_text(teacher, options.documents, options.length)
    written = tokenizer((HERE.parent / "alice.txt").read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    text = np.concatenate([sampled, np.array(written, np.uint16)])
    print(f"{time.time() - begin:.0f} s: {len(text):,} tokens of running text", flush=True)

    each = -(-options.rows // options.workers)
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        rows = np.concatenate(pool.map(pack_rows, [(text, each, seed) for seed in range(options.workers)]))
    print(f"{time.time() - begin:.0f} s: {rows.size:,} tokens in rows", flush=True)

    held_out, rows = rows[: options.batch], rows[options.batch :]
    ids = torch.from_numpy(held_out[:, :-1].astype(np.int64)).to(options.device)
    student = make_student(teacher, ids)
    distil(teacher, student, rows, options.seconds, options.batch, options.rates)

    student.to(torch.bfloat16).eval()
    with torch.no_grad():
        print(f"KL on rows not trained on: {divergence(teacher, student, ids).item():.4f}")
    options.out.mkdir(parents=True, exist_ok=True)
    student.save_pretrained(options.out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(TINY / name, options.out / name)


if __name__ == "__main__":
    main()
