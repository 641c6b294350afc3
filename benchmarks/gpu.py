"""What the GPU benchmarks share: timing by CUDA graphs, the machine's name, rows."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import triton

BUFFER_BYTES = 400e6
REPEATS = 40

Call = Callable[[], object]


def machine() -> dict[str, str]:
    """Date, GPU and versions, for every row.

    Raises:
        SystemExit: There is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; there is none here")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def graph_times(calls: Sequence[Call], least: int = 1) -> list[float]:
    """Microseconds a call, of repeated replays of all calls as one CUDA graph; sorted.

    The calls are repeated to at least `least`: a replay takes some microseconds of its own, which are shared out.
    """
    calls = [*calls] * -(-least // len(calls))
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
    return sorted(times[3:])


def spread(times: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile of sorted times."""
    low, median, high = (times[int(len(times) * share)] for share in (0.2, 0.5, 0.8))
    return low, median, high


def buffers(size: float) -> int:
    """Copies of an input of `size` bytes that together exceed the L2 cache."""
    return max(2, min(24, int(BUFFER_BYTES / size) + 1))


def copy_bandwidth() -> float:
    """Bytes read and written a microsecond by a kernel that copies 2 GiB (a graph's own copy is slower)."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / spread(graph_times([partial(torch.mul, source, 1, out=target)]))[1]


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows of equal keys as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def update_rows(path: Path, rows: Sequence[Mapping[str, object]], key: Sequence[str]) -> None:
    """Write rows in place of those with the same `key` fields; others stay, if they have the same columns."""
    kept: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = list(csv.DictReader(file))
    new = {tuple(str(row[name]) for name in key) for row in rows}
    same = [row for row in kept if list(row) == list(rows[0]) and tuple(row[name] for name in key) not in new]
    write_rows(path, [*same, *rows])
