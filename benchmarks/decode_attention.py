"""Time attention of one token over a packed cache against 16-bit attention, on a CUDA device.

Calls are captured in a CUDA graph, 32 at least, as many as a model has layers, over rotating buffers that are together
larger than the L2 cache, so that all of a layer's keys and values come from device memory. Ours is the whole call:
rotation of the query, attention over what the preset holds (sinks, far and near packed tokens, recent window),
combination and rotation back. FlashInfer is among the 16-bit kernels if it is installed. Rows go to
benchmarks/results/decode_attention.csv.

Run: python benchmarks/decode_attention.py [--out PATH] [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from gpu import buffers, copy_bandwidth, graph_times, machine, spread, write_rows
from split_kv import split_kv_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from turboquant_local.cache.storage import make_codec
from turboquant_local.codec.quantizer import Quantizer
from turboquant_local.config import TurboQuantConfig
from turboquant_local.kernels import api
from turboquant_local.kernels.layout import KVView, PackedKV, store_scales

MODELS = {"Llama-3.1-8B, Qwen3-4B": (32, 8), "Qwen2.5-7B": (28, 4)}
"""Query heads and KV heads."""
HEAD_DIM = 128
POINTS = ((1, 2048), (1, 8192), (1, 32768), (1, 131072), (8, 32768))
PRESETS = ("balanced", "compact", "extreme")
PAGE = 16
"""Tokens in a page of FlashInfer."""
RECENT = 28
"""Tokens in the window, which holds 25 to 32 of them by turns."""

LAYERS = 32
"""Calls in a graph at least."""

Call = Callable[[], torch.Tensor]


def packed_part(batch: int, kv_heads: int, tokens: int, quantizer: Quantizer, mean: torch.Tensor | None) -> PackedKV:
    """Random codes: the time does not depend on them."""
    size = (batch, kv_heads, tokens)
    codes = torch.randint(0, 256, (*size, HEAD_DIM * quantizer.bits // 8), dtype=torch.uint8, device="cuda")
    unit = torch.full((batch, kv_heads, 1), 8.0, device="cuda") if quantizer.scale_bits == 8 else None
    return PackedKV(quantizer, codes, store_scales(torch.rand(size, device="cuda") + 8, unit), unit, mean)


def packed_view(batch: int, kv_heads: int, context: int, config: TurboQuantConfig, keys: bool) -> KVView:
    """One side of one layer; keys have a mean to add back."""
    codec = make_codec(config, HEAD_DIM, config.k_bits if keys else config.v_bits, keys)
    mean = torch.randn(batch, kv_heads, 1, HEAD_DIM, device="cuda").bfloat16() if keys and config.center_keys else None
    far = context - config.sink_length - config.near_length - RECENT
    plain = torch.randn(batch, kv_heads, config.sink_length + RECENT, HEAD_DIM, device="cuda").bfloat16()
    sinks, recent = plain.split([config.sink_length, RECENT], dim=2)
    return KVView(
        sinks.contiguous(),
        packed_part(batch, kv_heads, far, codec.far, mean),
        packed_part(batch, kv_heads, config.near_length, codec.near, mean),
        recent.contiguous(),
    )


def stored_bytes(view: KVView) -> int:
    """Bytes of one side that one call reads."""
    packed = sum(x.nbytes for part in view.packed for x in (part.codes, part.scales) if x is not None)
    return view.sinks.nbytes + packed + view.recent.nbytes


def packed_calls(batch: int, heads: tuple[int, int], context: int, preset: str) -> tuple[int, list[Call]]:
    """Bytes a call, and one call a buffer."""
    config = TurboQuantConfig(preset=preset)
    query = torch.randn(batch, heads[0], 1, HEAD_DIM, device="cuda").bfloat16()
    sides, size = [], 1
    while len(sides) < buffers(size):
        sides.append([packed_view(batch, heads[1], context, config, keys) for keys in (True, False)])
        size = sum(map(stored_bytes, sides[0]))
    return size, [partial(api.attention, query, keys, values, impl="triton") for keys, values in sides]


def plain_calls(
    batch: int, heads: tuple[int, int], context: int, attention: Callable[..., torch.Tensor]
) -> tuple[int, list[Call]]:
    """The same over bfloat16 keys and values."""
    query = torch.randn(batch, heads[0], 1, HEAD_DIM, device="cuda").bfloat16()
    size = batch * context * heads[1] * HEAD_DIM * 4
    sides = torch.randn(buffers(size), 2, batch, heads[1], context, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    return size, [partial(attention, query, k, v) for k, v in sides]


def flashinfer_calls(batch: int, heads: tuple[int, int], context: int) -> tuple[int, list[Call]]:
    """The same by FlashInfer, over pages of 16 tokens."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    pages = context // PAGE
    decode = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(2**28, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True
    )
    starts, ids, last = (
        torch.tensor(x, dtype=torch.int32, device="cuda")
        for x in ([pages * i for i in range(batch + 1)], list(range(pages * batch)), [PAGE] * batch)
    )
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    decode.plan(starts, ids, last, *heads, HEAD_DIM, PAGE, **types)

    def attention(query: torch.Tensor, *sides: torch.Tensor) -> torch.Tensor:
        paged = tuple(side.view(batch * pages, PAGE, heads[1], HEAD_DIM) for side in sides)  # random in any order
        return decode.run(query[:, :, 0], paged)

    return plain_calls(batch, heads, context, attention)


def sdpa(backend: SDPBackend, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention by one of its implementations."""
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, k, v, enable_gqa=True)


def main() -> None:
    """Measure all points, print a table and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decode_attention.csv")
    parser.add_argument("--quick", action="store_true", help="only the first point")
    options = parser.parse_args()
    where = machine()
    plain = {
        "torch flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "torch cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "bf16 split-KV Triton": split_kv_attention,
    }
    rows = []
    copied = copy_bandwidth()
    print(f"copy bandwidth {copied / 1e6:.2f} TB/s", flush=True)
    for model, heads in MODELS.items():
        for batch, context in POINTS[: 1 if options.quick else None]:
            best = float("inf")
            measured: dict[str, Callable[[], tuple[int, list[Call]]]] = {
                name: partial(plain_calls, batch, heads, context, call) for name, call in plain.items()
            }
            if find_spec("flashinfer"):
                name = f"FlashInfer {version('flashinfer-python')}"
                measured[name] = partial(flashinfer_calls, batch, heads, context)
            measured |= {f"ours {name}": partial(packed_calls, batch, heads, context, name) for name in PRESETS}
            for name, make in measured.items():
                size, calls = make()
                low, median, high = spread(graph_times(calls, least=LAYERS))
                best = best if "ours" in name else min(best, median)
                row = {
                    **where, "model": model, "batch": batch, "context": context, "kernel": name,
                    "us_p20": f"{low:.2f}", "us_median": f"{median:.2f}", "us_p80": f"{high:.2f}",
                    "tb_per_s": f"{size / median / 1e6:.3f}",
                    "share_of_copy_bandwidth": f"{size / median / copied:.3f}",
                    "speedup_over_best_16_bit": f"{best / median:.3f}",
                }  # fmt: skip
                rows.append(row)
                print(f"{model} B={batch} {context:>7} {name:<21} {median:8.1f} us {row['tb_per_s']:>6} TB/s "
                      f"{row['speedup_over_best_16_bit']:>6}x", flush=True)  # fmt: skip
                del calls, make
                torch.cuda.empty_cache()
                write_rows(options.out, rows)  # as they come


if __name__ == "__main__":
    main()
