"""What the kernels run on."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton


def unserved(device: torch.device) -> str | None:
    """Why no kernel runs on this device, or None."""
    if device.type != "cuda":
        if triton.knobs.runtime.interpret:
            return None
        return f"device={device}: it needs a CUDA device, or TRITON_INTERPRET=1"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return f"device={device}: it needs an NVIDIA GPU of compute capability 8.0 or more"
    return None


@lru_cache(maxsize=8)
def hopper(device: torch.device) -> bool:
    """Whether tensor cores take their operands from shared memory, 64 rows at a time."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@lru_cache(maxsize=8)
def copies_tiles(device: torch.device) -> bool:
    """Whether an engine copies tiles of tensors into shared memory; the interpreter does as if."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache(maxsize=8)
def launch_early(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch that need not wait for the end of the kernel before (programmatic dependent launch).

    The kernel takes EARLY, and waits (`gdc_wait`) before it reads what that one writes, or writes anything itself.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


@lru_cache(maxsize=8)
def multiprocessors(device: torch.device) -> int:
    """How many there are; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


_COUNTERS = 2**12
_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


def counters(device: torch.device, count: int) -> torch.Tensor:
    """Integers that are 0, and that whoever counts with them leaves 0 again.

    Calls that may run at the same time get different ones: every stream has its own, and so have captured graphs, which
    may be replayed on any. Graphs replayed at the same time as each other must not share them.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32)
    capturing = torch.cuda.is_current_stream_capturing()
    stream = -1 if capturing else torch.cuda.current_stream(device).cuda_stream
    for number in (stream,) if capturing else (stream, -1):  # memory must not come into being during a capture
        if (device, number) not in _counters and not capturing:
            _counters[device, number] = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
    kept = _counters.get((device, stream))
    return torch.zeros(count, dtype=torch.int32, device=device) if kept is None or count > _COUNTERS else kept
