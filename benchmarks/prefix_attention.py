"""Time attention of many new tokens over a packed prefix against 16-bit attention, on a CUDA device.

The new tokens attend to the packed prefix (4 bits: what the preset "balanced" holds) and, causally, to each other. Ours
is the whole call: rotation of the queries, attention over sinks, packed tokens and recent window, and rotation back;
`impl="reference"` is the path in torch, tile by tile. torch's kernels read the same tokens uncompressed, cuDNN's
without a mask, since it aligns a causal one with the first key. Rows go to benchmarks/results/prefix_attention.csv.

Run: python benchmarks/prefix_attention.py [--out PATH] [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from decode_attention import HEAD_DIM, RECENT, packed_view, sdpa
from gpu import graph_times, machine, spread, write_rows
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from turboquant_local.config import TurboQuantConfig
from turboquant_local.kernels import api

Q_HEADS, KV_HEADS = 32, 8  # Llama-3.1-8B
POINTS = ((64, 32768), (512, 8192), (512, 32768), (512, 131072), (4096, 32768))
PRESET = "balanced"
BUFFERS = 2

Call = Callable[[], torch.Tensor]


def queries(new: int) -> torch.Tensor:
    """As a model gives them."""
    return torch.randn(1, Q_HEADS, new, HEAD_DIM, device="cuda").bfloat16()


def packed_calls(new: int, context: int, impl: str) -> Iterator[Call]:
    """Calls over buffers of their own."""
    config = TurboQuantConfig(preset=PRESET)
    for _ in range(BUFFERS if impl == "triton" else 1):
        keys, values = (packed_view(1, KV_HEADS, context, config, keys) for keys in (True, False))
        recent = torch.randn(2, 1, KV_HEADS, RECENT + new, HEAD_DIM, device="cuda").bfloat16()
        keys, values = (replace(side, recent=x) for side, x in zip((keys, values), recent, strict=True))
        yield partial(api.attention, queries(new), keys, values, impl=impl)


def plain_calls(new: int, context: int, attention: Callable[..., torch.Tensor]) -> Iterator[Call]:
    """The same over bfloat16 keys and values."""
    for _ in range(BUFFERS):
        k, v = torch.randn(2, 1, KV_HEADS, context + new, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        yield partial(attention, queries(new), k, v)


def flash(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's flash attention, causal, the last query with the last key."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        mask = causal_lower_right(query.shape[2], k.shape[2])
        return scaled_dot_product_attention(query, k, v, attn_mask=mask, enable_gqa=True)


def event_times(calls: list[Call]) -> list[float]:
    """Microseconds of each call, without a graph."""
    times = []
    for call in (calls[0], *calls):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return sorted(times[1:])


def main() -> None:
    """Measure all points, print a table and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "prefix_attention.csv")
    parser.add_argument("--quick", action="store_true", help="only the first point")
    options = parser.parse_args()
    where = machine()
    rows = []
    for new, context in POINTS[: 1 if options.quick else None]:
        medians: dict[str, float] = {}
        measured: dict[str, tuple[Iterator[Call], Callable[[list[Call]], list[float]]]] = {
            "torch flash": (plain_calls(new, context, flash), graph_times),
            "torch cuDNN, no mask": (
                plain_calls(new, context, partial(sdpa, SDPBackend.CUDNN_ATTENTION)), graph_times,
            ),
            "ours": (packed_calls(new, context, "triton"), graph_times),
            "ours, reference": (packed_calls(new, context, "reference"), event_times),
        }  # fmt: skip
        operations = 4 * Q_HEADS * HEAD_DIM * new * (context + (new + 1) / 2)
        for name, (calls, times) in measured.items():
            low, median, high = spread(times(list(calls)))
            medians[name] = median
            row = {
                **where, "new": new, "context": context, "kernel": name,
                "us_p20": f"{low:.1f}", "us_median": f"{median:.1f}", "us_p80": f"{high:.1f}",
                "tflops": f"{operations / median / 1e6:.1f}",
                "speedup_over_flash": f"{medians['torch flash'] / median:.3f}",
            }  # fmt: skip
            rows.append(row)
            print(f"{new:>5} over {context:>7} {name:<22} {median:10.1f} us {row['tflops']:>6} TFLOP/s "
                  f"{row['speedup_over_flash']:>6}x flash", flush=True)  # fmt: skip
            torch.cuda.empty_cache()
    write_rows(options.out, rows)


if __name__ == "__main__":
    main()
