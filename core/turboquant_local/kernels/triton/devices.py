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
def multiprocessors(device: torch.device) -> int:
    """How many there are; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
