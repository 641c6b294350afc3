"""Device code of kernels that start before the one before them is done (programmatic dependent launch).

Launched with `devices.launch_early`, a program does what depends on no kernel before, and waits where it goes on to
what does. It writes nothing, and reads nothing that a kernel of the same step writes, before it waits; and every kernel
waits somewhere, since its being done tells the next that all before it are.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """Let the next kernel start as soon as all programs of this one have come here."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait(EARLY: tl.constexpr):
    """Wait until all kernels before are done, and what they wrote can be read."""
    if EARLY:
        gdc_wait()


@triton.jit
def ask_for(rows, first, end, BYTES: tl.constexpr, MOST: tl.constexpr, EARLY: tl.constexpr):
    """Ask for rows `first` to `end` of BYTES bytes, but at most MOST of them, to be brought into the L2 cache.

    What lies behind the last of them is never asked for, and row 0 if there is none: it must exist.
    """
    if EARLY:
        LINES: tl.constexpr = triton.next_power_of_2(triton.cdiv(BYTES * MOST, 128))
        size = tl.full([], BYTES, tl.int64)
        byte = tl.minimum(first * size + tl.arange(0, LINES) * 128, tl.maximum(end * size - 1, 0))
        at = rows.to(tl.pointer_type(tl.uint8), bitcast=True) + byte
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; // $0", "=r,l", [at], tl.int32, is_pure=False, pack=1)
