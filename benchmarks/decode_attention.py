"""Time attention of one token over a packed cache against 16-bit attention, on a CUDA device.

Every call is captured in a CUDA graph over rotating buffers that are together larger than the L2 cache, so that all of
a layer's keys and values come from device memory. Ours is the whole call: rotation of the query, attention over sinks,
packed tokens and recent window, combination and rotation back. Rows go to benchmarks/results/decode_attention.csv.

Run: python benchmarks/decode_attention.py [--out PATH] [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from gpu import buffers, graph_times, machine, spread, write_rows
from split_kv import split_kv_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from turboquant_local.codec.quantizer import MSEQuantizer
from turboquant_local.kernels import api
from turboquant_local.kernels.layout import KVView, PackedKV, store_scales, vector_bytes

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # Llama-3.1-8B
SINKS, NEAR, RECENT = 4, 256, 28  # what the default settings hold beside the far tokens
POINTS = ((1, 2048), (1, 8192), (1, 32768), (1, 131072), (8, 32768))
BITS = ((4, 4), (3, 3), (2, 2))

Call = Callable[[], torch.Tensor]


def packed_part(batch: int, tokens: int, quantizer: MSEQuantizer, mean: torch.Tensor | None) -> PackedKV:
    """Random codes: the time does not depend on them."""
    size = (batch, KV_HEADS, tokens)
    codes = torch.randint(0, 256, (*size, HEAD_DIM * quantizer.bits // 8), dtype=torch.uint8, device="cuda")
    unit = torch.full((batch, KV_HEADS, 1), 8.0, device="cuda") if quantizer.scale_bits == 8 else None
    return PackedKV(quantizer, codes, store_scales(torch.rand(size, device="cuda") + 8, unit), unit, mean)


def packed_view(batch: int, context: int, bits: int, center: bool) -> KVView:
    """One side of one layer; keys have a mean to add back, as in the default settings."""
    mean = torch.randn(batch, KV_HEADS, 1, HEAD_DIM, device="cuda").bfloat16() if center else None
    far = packed_part(batch, context - SINKS - NEAR - RECENT, MSEQuantizer(HEAD_DIM, bits, scale_bits=8), mean)
    plain = torch.randn(batch, KV_HEADS, SINKS + RECENT, HEAD_DIM, device="cuda").bfloat16()
    sinks, recent = plain.split([SINKS, RECENT], dim=2)
    return KVView(
        sinks.contiguous(), far, packed_part(batch, NEAR, MSEQuantizer(HEAD_DIM, 6), mean), recent.contiguous()
    )


def stored_bytes(batch: int, context: int, bits: tuple[int, int]) -> int:
    """Bytes that one call reads of keys and values."""
    far = sum(vector_bytes(MSEQuantizer(HEAD_DIM, b, scale_bits=8), torch.bfloat16) for b in bits)
    near = 2 * vector_bytes(MSEQuantizer(HEAD_DIM, 6), torch.bfloat16)
    plain = 2 * (SINKS + RECENT) * HEAD_DIM * 2
    return batch * KV_HEADS * ((context - SINKS - NEAR - RECENT) * far + NEAR * near + plain)


def packed_calls(batch: int, context: int, bits: tuple[int, int]) -> Iterator[Call]:
    """One call a buffer."""
    query = torch.randn(batch, Q_HEADS, 1, HEAD_DIM, device="cuda").bfloat16()
    for _ in range(buffers(stored_bytes(batch, context, bits))):
        keys, values = (packed_view(batch, context, b, center) for b, center in zip(bits, (True, False), strict=True))
        yield partial(api.attention, query, keys, values, impl="triton")


def plain_calls(batch: int, context: int, attention: Callable[..., torch.Tensor]) -> Iterator[Call]:
    """The same over bfloat16 keys and values."""
    query = torch.randn(batch, Q_HEADS, 1, HEAD_DIM, device="cuda").bfloat16()
    for _ in range(buffers(batch * context * KV_HEADS * HEAD_DIM * 4)):
        k, v = torch.randn(2, batch, KV_HEADS, context, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        yield partial(attention, query, k, v)


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
    for batch, context in POINTS[: 1 if options.quick else None]:
        medians: dict[str, float] = {}
        plain_bytes = batch * KV_HEADS * context * HEAD_DIM * 4
        measured: list[tuple[str, int, Iterator[Call]]] = [
            (name, plain_bytes, plain_calls(batch, context, call)) for name, call in plain.items()
        ]
        measured += [
            (f"ours K{bits[0]}V{bits[1]}", stored_bytes(batch, context, bits), packed_calls(batch, context, bits))
            for bits in BITS
        ]
        for name, size, calls in measured:
            low, median, high = spread(graph_times(list(calls)))
            medians[name] = median
            best = min(medians[other] for other in plain if other in medians)
            row = {
                **where, "batch": batch, "context": context, "kernel": name,
                "us_p20": f"{low:.2f}", "us_median": f"{median:.2f}", "us_p80": f"{high:.2f}",
                "tb_per_s": f"{size / median / 1e6:.3f}", "speedup_over_best_16_bit": f"{best / median:.3f}",
            }  # fmt: skip
            rows.append(row)
            print(f"B={batch} {context:>7} {name:<22} {median:8.1f} us {row['tb_per_s']:>6} TB/s "
                  f"{row['speedup_over_best_16_bit']:>6}x", flush=True)  # fmt: skip
            torch.cuda.empty_cache()
    write_rows(options.out, rows)


if __name__ == "__main__":
    main()
