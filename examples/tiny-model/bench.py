"""Measure the model (or any chat model with a chat template) by greedy generation.

    python bench.py [MODEL_DIR] --filler TEXT_FILE --n 100 --tasks passkey1@4096 tool-explicit json

Scores: retrieval, facts and RAG count a reply that contains the expected value; tool calls must give
the exact name and arguments; JSON answers must equal the expected object (validity is given apart).
"""
import argparse
import json
import os
import re
import time

import torch

import data as D

HERE = os.path.dirname(os.path.abspath(__file__))
LENGTHS = (512, 1024, 2048, 4096)
TASKS = [f"passkey{k}@{n}" for k in (1, 4, 16) for n in LENGTHS] + [
    "kv16", "kv64", "rag", "capital", "capital-phrasings", "tool-explicit", "tool-natural", "tool-none", "tool-result", "json"]


def samples(task, n, filler, count, seed=0):
    """`n` held-out samples of a task; other seeds give other sets."""
    m = re.fullmatch(r"passkey(\d+)@(\d+)", task)
    if m:
        k, length = int(m[1]), int(m[2])
        return [D.passkey(length - 32, k, seed + i, filler, count) for i in range(n)]
    if m := re.fullmatch(r"kv(\d+)", task):
        return [D.kv_recall(int(m[1]), seed + i) for i in range(n)]
    if task == "rag":
        pool = D.split_sentences(filler)[:3000]
        return [D.rag_qa(5, seed + i, filler=pool, unknown=False) for i in range(n)]
    if task == "capital":
        return [D.capital_qa(i=i) for i in range(len(D.lexicon()["countries"]))]
    if task == "capital-phrasings":
        return [D.capital_qa(seed=seed + i) for i in range(n)]
    if task == "tool-result":
        return [D.tool_call(seed + 10**6 + i, kind="explicit", with_result=True) for i in range(n)]
    if task.startswith("tool-"):
        return [D.tool_call(seed + i, kind=task[5:], with_result=False) for i in range(n)]
    return [D.json_task(seed + i) for i in range(n)]


def parse_call(text):
    m = re.search(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", text, re.S)
    try:
        c = json.loads(m[1])
        return c["name"], c["arguments"]
    except (TypeError, ValueError, KeyError):
        return None


def judge(task, sample, reply):
    """(correct, well formed)"""
    if task in ("tool-explicit", "tool-natural"):
        got, want = parse_call(reply), parse_call(sample.answer)
        return got == want, got is not None
    if task == "tool-none":
        return reply.strip() == sample.answer.strip(), "<tool_call>" not in reply
    if task == "json":
        try:
            return json.loads(reply) == json.loads(sample.answer), True
        except ValueError:
            return False, False
    return sample.answer.strip() in reply, True


@torch.no_grad()
def generate(model, tok, batch, max_new_tokens):
    texts = [tok.apply_chat_template(s.prompt(), tools=s.tools, tokenize=False, add_generation_prompt=True) for s in batch]
    x = tok(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False).to(model.device)
    y = model.generate(**x, max_new_tokens=max_new_tokens, do_sample=False)
    out = tok.batch_decode(y[:, x["input_ids"].shape[1]:], skip_special_tokens=True)
    return out


def perplexity(model, tok, text, context=4096):
    """Bits per byte and token perplexity, non-overlapping windows, each opened by <|endoftext|>."""
    import math
    ids = torch.tensor(tok(text, add_special_tokens=False).input_ids)
    nll = 0.0
    with torch.no_grad():
        for i in range(0, len(ids), context - 1):
            x = torch.cat([torch.tensor([0]), ids[i:i + context - 1]])[None].to(model.device)
            logits = model(x[:, :-1]).logits.float()
            nll += torch.nn.functional.cross_entropy(logits[0], x[0, 1:], reduction="sum").item()
    return {"bits_per_byte": nll / math.log(2) / len(text.encode()), "token_ppl": math.exp(nll / len(ids)), "tokens": len(ids)}


def main():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    ap = argparse.ArgumentParser()
    ap.add_argument("model", nargs="?", default=HERE)
    ap.add_argument("--n", type=int, default=100)
    ap.add_argument("--tasks", nargs="*", default=TASKS)
    ap.add_argument("--filler", required=True, help="a text file (200 kB or more) that hides the needles")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--dtype", default="bfloat16")
    ap.add_argument("--batch", type=int, default=50)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--ppl", nargs="*", default=[], help="text files for perplexity")
    ap.add_argument("--show", type=int, default=2, help="failures to print per task")
    ap.add_argument("--out")
    a = ap.parse_args()
    tok = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=getattr(torch, a.dtype)).to(a.device).eval()
    filler = open(a.filler, encoding="utf-8").read().replace("\0", "\n")
    count = lambda t: len(tok(t, add_special_tokens=False).input_ids)
    result = {}
    for task in a.tasks:
        t0, good, formed, bad = time.time(), 0, 0, []
        todo = samples(task, a.n, filler, count, a.seed)
        for i in range(0, len(todo), a.batch):
            part = todo[i:i + a.batch]
            for s, reply in zip(part, generate(model, tok, part, 160 if task.startswith(("tool", "json")) else 48)):
                g, f = judge(task, s, reply)
                good, formed = good + g, formed + f
                if not g:
                    bad.append((s.prompt()[-1].get("content", "")[-200:], s.answer, reply))
        result[task] = {"correct": good / len(todo), "well_formed": formed / len(todo), "n": len(todo)}
        print(f"{task:20s} {good / len(todo):.3f} well formed {formed / len(todo):.3f} n {len(todo)} ({time.time() - t0:.0f}s)", flush=True)
        for q, want, got in bad[: a.show]:
            print("   asked", repr(q), "\n   want ", repr(want), "\n   got  ", repr(got), flush=True)
    for p in a.ppl:
        result["ppl:" + os.path.basename(p)] = r = perplexity(model, tok, open(p, encoding="utf-8").read())
        print(os.path.basename(p), r, flush=True)
    if a.out:
        with open(a.out, "w") as f:
            json.dump(result, f, indent=1)


if __name__ == "__main__":
    main()
