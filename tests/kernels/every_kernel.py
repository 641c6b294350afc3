"""A little of everything that runs in Triton on a CUDA device, for compute-sanitizer: see test_sanitizer.py.

A prompt is packed, tokens are decoded in a captured graph until more is packed, a second prompt attends to the codes,
and the whole is decompressed. What only long contexts launch is called by itself: tiles by the copy engine, and shares
merged in branches. With the argument "late" no kernel starts before the one before it has ended.
"""

import sys
from typing import Any

import torch
from conftest import Case
from torch.nn import functional
from transformers import GenerationConfig, LogitsProcessorList

from turboquant_local import TurboQuantCache
from turboquant_local.engine.decode_loop import DecodeLoop
from turboquant_local.engine.sampling import Sampling
from turboquant_local.kernels import api
from turboquant_local.kernels.triton import decode_attention, products, step
from turboquant_local.testing import random_tokens, tiny_model


def in_float32(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, linear: Any = functional.linear
) -> torch.Tensor:
    """A product that racecheck bears: it breaks on cuBLAS's kernels for 16-bit numbers, even if told to skip them."""
    out: torch.Tensor = linear(x.float(), weight.float(), None if bias is None else bias.float())
    return out.to(x.dtype)


def long_context() -> None:
    """Raises if it is wrong."""
    for bits, group, waves in ((4, 4, 0.05), (3, 4, 0.05), (4, 8, 1.0)):
        keys, values = Case().views(1_500, 1, 128, 128, bits, bits, dtype=torch.bfloat16, batch=1)
        query = Case.queries(group, 1, 128, torch.bfloat16, batch=1)
        launch = decode_attention.Launch(warps=2, stages=2, waves=waves, sides=2, copies=True, others=1)
        out = decode_attention.attention(
            query, keys, values, mask=None, causal=False, scaling=128**-0.5, softcap=None, sink_logits=None,
            launch=launch,
        )  # fmt: skip
        assert Case.error(out, Case.exact(query, keys, values, Case.causal(1, 1_500))) < 5e-3


def main() -> None:
    """Raises if anything runs in torch instead."""
    if "late" in sys.argv:
        for module in (decode_attention, products, step):
            module.launch_early = lambda _: {"EARLY": False}
        functional.linear = in_float32
    model = tiny_model("llama", head_dim=64).to("cuda", torch.bfloat16)
    cache = TurboQuantCache(model.config, "compact", near_length=64)
    loop, tokens = DecodeLoop(), random_tokens(1, 300).cuda()
    sampling = Sampling(GenerationConfig(max_new_tokens=40), LogitsProcessorList(), frozenset(), ())
    for _ in range(2):
        ids = tokens[0].tolist()

        def read(token: int, ids: list[int] = ids) -> bool:
            ids.append(token)
            return False

        assert loop.run(model, cache, tokens, sampling, read) == "cuda graph"
        tokens = torch.cat([torch.tensor([ids], device="cuda"), random_tokens(1, 30, seed=1).cuda()], dim=1)
    assert set(cache.stats.attention) <= {"exact", "triton"}, cache.stats.attention
    assert set(cache.stats.packing) == {"triton"}, cache.stats.packing
    for part in (*cache.layers[0]._k.packed, *cache.layers[0]._v.packed):
        assert api.dequantize_kv(part, torch.bfloat16, impl="triton").isfinite().all()
    long_context()
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
