"""Time the packing of a prefill's keys and values on a CUDA device, against a copy of the same bytes.

Vectors are bfloat16 and together larger than the L2 cache; the calls are captured in a CUDA graph. Keys are centred,
values are not. "quantize" goes from vectors to codes; "requantize" from near codes (6 bits) to far ones, for keys with
error feedback. Rows go to benchmarks/results/quantize.csv.

Run: python benchmarks/quantize.py [--out PATH]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from gpu import buffers, copy_bandwidth, graph_times, machine, spread, write_rows

from turboquant_local.codec.quantizer import MSEQuantizer
from turboquant_local.codec.statistics import HeadStatistics, head_statistics
from turboquant_local.kernels import api
from turboquant_local.kernels.layout import vector_bytes

KV_HEADS, HEAD_DIM = 8, 128  # Llama-3.1-8B
TOKENS = (2048, 32768)
NEAR_BITS = 6
POINTS = (
    *(("quantize", bits, impl) for bits in (8, NEAR_BITS, 4, 3, 2) for impl in ("triton", "reference")),
    *(("requantize", bits, "triton") for bits in (4, 3, 2)),
)


def quantizer_of(bits: int) -> MSEQuantizer:
    """The codec of the presets."""
    return MSEQuantizer(HEAD_DIM, bits, scale_bits=8 if bits <= 4 else 16, codebook="grid")


def main() -> None:
    """Measure all points, print a table and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quantize.csv")
    options = parser.parse_args()
    where, rows = machine(), []
    copied = copy_bandwidth()
    print(f"copy bandwidth {copied / 1e6:.2f} TB/s")
    near = quantizer_of(NEAR_BITS)
    for tokens in TOKENS:
        vectors = KV_HEADS * tokens
        plain = vectors * HEAD_DIM * 2
        inputs = torch.randn(buffers(plain), 1, KV_HEADS, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        for side in ("keys", "values"):
            statistics = head_statistics(inputs[0], center=side == "keys", weigh=side == "keys", unit=True)
            unweighted = HeadStatistics(statistics.mean, None, statistics.scale_unit)
            packed = [api.quantize_kv(x, near, unweighted) for x in inputs]
            for operation, bits, impl in POINTS:
                quantizer = quantizer_of(bits)
                size = vectors * vector_bytes(quantizer, torch.bfloat16)
                if operation == "quantize":
                    calls = [partial(api.quantize_kv, x, quantizer, unweighted, impl=impl) for x in inputs]
                    size += plain
                else:
                    calls = [partial(api.requantize_kv, x, quantizer, statistics, impl=impl) for x in packed]
                    size += vectors * vector_bytes(near, torch.bfloat16)
                low, median, high = spread(graph_times(calls))
                rows.append({
                    **where, "tokens": tokens, "side": side, "operation": operation, "bits": bits, "impl": impl,
                    "us_p20": f"{low:.2f}", "us_median": f"{median:.2f}", "us_p80": f"{high:.2f}",
                    "tb_per_s": f"{size / median / 1e6:.3f}",
                    "share_of_copy_bandwidth": f"{size / median / copied:.3f}",
                })  # fmt: skip
                print(f"{tokens:>6} {side:<6} {operation:<10} {bits} bits {impl:<9} {median:9.1f} us "
                      f"{rows[-1]['share_of_copy_bandwidth']} of copy bandwidth", flush=True)  # fmt: skip
    write_rows(options.out, rows)


if __name__ == "__main__":
    main()
