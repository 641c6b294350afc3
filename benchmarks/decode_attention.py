"""Time attention of one token over a packed cache against 16-bit attention, on a CUDA device.

Every call is captured in a CUDA graph over rotating buffers that are together larger than the L2 cache, so that all of
a layer's keys and values come from device memory. Ours is the whole call: rotation of the query, attention over sinks,
packed tokens and recent window, combination and rotation back. Rows go to benchmarks/results/decode_attention.csv.

Run: python benchmarks/decode_attention.py [--out PATH] [--quick]
"""

from __future__ import annotations

import argparse
import csv
import datetime
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import triton
from split_kv import split_kv_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from turboquant_local.codec.quantizer import MSEQuantizer
from turboquant_local.kernels import api
from turboquant_local.kernels.layout import KVView, PackedKV, vector_bytes

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # Llama-3.1-8B
SINKS, RECENT = 4, 124
POINTS = ((1, 2048), (1, 8192), (1, 32768), (1, 131072), (8, 32768))
BITS = ((4, 4), (3, 3), (2, 2))
BUFFER_BYTES = 400e6
REPEATS = 40

Call = Callable[[], torch.Tensor]


def packed_view(batch: int, context: int, bits: int) -> KVView:
    """Random codes: the time does not depend on them."""
    packed = context - SINKS - RECENT
    size = (batch, KV_HEADS, packed)
    codes = torch.randint(0, 256, (*size, HEAD_DIM * bits // 8), dtype=torch.uint8, device="cuda")
    scales = torch.rand(size, device="cuda").half() + 8
    plain = torch.randn(batch, KV_HEADS, SINKS + RECENT, HEAD_DIM, device="cuda").bfloat16()
    quantizer = MSEQuantizer(HEAD_DIM, bits)
    return KVView(
        plain[:, :, :SINKS].contiguous(), PackedKV(quantizer, codes, scales, None), plain[:, :, SINKS:].contiguous()
    )


def packed_calls(batch: int, context: int, bits: tuple[int, int]) -> Iterator[Call]:
    """One call a buffer; keys have a mean to add back, as in the default settings."""
    query = torch.randn(batch, Q_HEADS, 1, HEAD_DIM, device="cuda").bfloat16()
    mean = torch.randn(batch, KV_HEADS, 1, HEAD_DIM, device="cuda").bfloat16()
    for _ in range(_buffers(batch * context * KV_HEADS * sum(vector_bytes(HEAD_DIM, b, torch.bfloat16) for b in bits))):
        keys, values = (packed_view(batch, context, b) for b in bits)
        assert keys.packed is not None
        keys = KVView(
            keys.sinks, PackedKV(keys.packed.quantizer, keys.packed.codes, keys.packed.scales, mean), keys.recent
        )
        yield partial(api.attention, query, keys, values, impl="triton")


def plain_calls(batch: int, context: int, attention: Callable[..., torch.Tensor]) -> Iterator[Call]:
    """The same over bfloat16 keys and values."""
    query = torch.randn(batch, Q_HEADS, 1, HEAD_DIM, device="cuda").bfloat16()
    for _ in range(_buffers(batch * context * KV_HEADS * HEAD_DIM * 4)):
        k, v = torch.randn(2, batch, KV_HEADS, context, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        yield partial(attention, query, k, v)


def sdpa(backend: SDPBackend, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention by one of its implementations."""
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, k, v, enable_gqa=True)


def graph_times(calls: list[Call]) -> list[float]:
    """Microseconds a call, of repeated replays of all calls as one CUDA graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPEATS + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return times[3:]


def _buffers(size: float) -> int:
    return max(2, min(24, int(BUFFER_BYTES / size) + 1))


def main() -> None:
    """Measure all points, print a table and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decode_attention.csv")
    parser.add_argument("--quick", action="store_true", help="only the first point")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; there is none here")
    plain = {
        "torch flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "torch cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "bf16 split-KV Triton": split_kv_attention,
    }
    machine = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    rows = []
    for batch, context in POINTS[: 1 if options.quick else None]:
        medians: dict[str, float] = {}
        measured: list[tuple[str, float, Iterator[Call]]] = [
            (name, 16, plain_calls(batch, context, call)) for name, call in plain.items()
        ]
        measured += [(f"ours K{k}V{v}", (k + v) / 2, packed_calls(batch, context, (k, v))) for k, v in BITS]
        for name, bits, calls in measured:
            times = sorted(graph_times(list(calls)))
            low, median, high = (times[int(len(times) * share)] for share in (0.2, 0.5, 0.8))
            medians[name] = median
            best = min(medians[other] for other in plain if other in medians)
            vector = (
                HEAD_DIM * 2 if bits == 16 else vector_bytes(HEAD_DIM, 1, torch.bfloat16) - 16 + HEAD_DIM * bits / 8
            )
            size = 2 * batch * KV_HEADS * ((context - SINKS - RECENT) * vector + (SINKS + RECENT) * HEAD_DIM * 2)
            row = {
                **machine, "batch": batch, "context": context, "kernel": name,
                "us_p20": f"{low:.2f}", "us_median": f"{median:.2f}", "us_p80": f"{high:.2f}",
                "tb_per_s": f"{size / median / 1e6:.3f}", "speedup_over_best_16_bit": f"{best / median:.3f}",
            }  # fmt: skip
            rows.append(row)
            print(f"B={batch} {context:>7} {name:<22} {median:8.1f} us {row['tb_per_s']:>6} TB/s "
                  f"{row['speedup_over_best_16_bit']:>6}x", flush=True)  # fmt: skip
            torch.cuda.empty_cache()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
