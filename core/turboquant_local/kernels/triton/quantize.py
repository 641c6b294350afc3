"""Quantisation of keys and values in one pass."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import torch
import triton

from turboquant_local.codec.packing import packed_size
from turboquant_local.codec.quantizer import MSEQuantizer, Quantizer
from turboquant_local.codec.statistics import HeadStatistics
from turboquant_local.kernels.layout import PackedKV, store_scales
from turboquant_local.kernels.triton.devices import multiprocessors, unserved
from turboquant_local.kernels.triton.quantize_kernel import quantize_tiles

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OPTIONS = {"head_dim", "bits", "rotation", "scale", "seed", "scale_bits", "codebook"}
_SCALES = ("norm", "unbiased", "least_error")
_UNIT = 2.0**-6
"""The rotation is held in multiples of it, so that the smaller of its two float16 terms keeps its bits."""


@dataclass(frozen=True)
class Launch:
    """How the work is cut up.

    Attributes:
        tile: Vectors a program takes at once.
        warps: Warps of a program.
        programs: Programs for every multiprocessor, at most.
    """

    tile: int = 64
    warps: int = 4
    programs: int = 2


def refusal(x: torch.Tensor, quantizer: Quantizer, statistics: HeadStatistics) -> str | None:
    """Why this call is not served, or None."""
    reason = unserved(x.device)
    if reason is not None:
        return reason
    if not isinstance(quantizer, MSEQuantizer):
        return f"{type(quantizer).__name__}: it serves the MSE quantizer"
    unknown = [f.name for f in fields(quantizer) if f.name not in _OPTIONS and getattr(quantizer, f.name)]
    if unknown or quantizer.scale not in _SCALES:
        return f"{', '.join(unknown) or 'scale=' + quantizer.scale}: it does not know this option of the quantizer"
    if quantizer.codebook != "lloyd_max":
        return f"codebook={quantizer.codebook}: it serves lloyd_max"
    if statistics.weights is not None:
        return "weights of channels are given: it rounds every coordinate by itself"
    if not 32 <= quantizer.head_dim <= 256:
        return f"head_dim={quantizer.head_dim}: it serves 32 to 256"
    if x.dtype not in DTYPES:
        return f"dtype={x.dtype}: it serves {', '.join(map(str, DTYPES))}"
    if torch.is_grad_enabled() and x.requires_grad:
        return "a gradient is wanted: it has none"
    return None


def quantize_kv(
    x: torch.Tensor, quantizer: Quantizer, statistics: HeadStatistics, launch: Launch | None = None
) -> PackedKV:
    """See `kernels.api.quantize_kv`; `refusal` says what is served."""
    assert isinstance(quantizer, MSEQuantizer)
    batch, heads, tokens, head_dim = x.shape
    mean, unit = statistics.mean, statistics.scale_unit if quantizer.scale_bits == 8 else None
    x = x if x.stride(3) == 1 else x.contiguous()
    codes = torch.empty(batch, heads, tokens, packed_size(head_dim, quantizer.bits), dtype=torch.uint8, device=x.device)
    scales = torch.empty(batch, heads, tokens, dtype=torch.float32, device=x.device)
    _, centroids, boundaries = quantizer.constants(x.device)[:3]
    padded = triton.next_power_of_2(head_dim)
    launch = launch or (Launch() if padded <= 128 else Launch(tile=32, warps=8))
    tiles = batch * heads * triton.cdiv(tokens, launch.tile)
    if not tiles:
        return PackedKV(quantizer, codes, store_scales(scales, unit), unit, mean)
    quantize_tiles[(min(tiles, launch.programs * multiprocessors(x.device)),)](
        x, x if mean is None else mean.contiguous(), _terms(quantizer, x.device), boundaries, centroids, codes, scales,
        batch * heads, tokens, heads, *x.stride()[:3], _UNIT,
        D=head_dim, DP=padded, BITS=quantizer.bits, SCALE=quantizer.scale, MEAN=mean is not None,
        SPLIT=mean is not None or x.dtype == torch.float32, BT=launch.tile,
        num_warps=launch.warps,
    )  # fmt: skip
    return PackedKV(quantizer, codes, store_scales(scales, unit), unit, mean)


@lru_cache(maxsize=64)
def _terms(quantizer: MSEQuantizer, device: torch.device) -> torch.Tensor:
    """The transposed rotation over `_UNIT` as a sum of two float16 matrices, `[2, padded, padded]`.

    Columns, in blocks of 64 where there are 256, are in the order of `quantize_kernel._rotated`: column 8j + 2t + e of
    N is coordinate tN/4 + 2j + e.
    """
    head_dim = quantizer.head_dim
    padded = triton.next_power_of_2(head_dim)
    matrix = torch.zeros(padded, padded)
    matrix[:head_dim, :head_dim] = quantizer.constants(torch.device("cpu"))[0].T / _UNIT
    block = padded if padded <= 128 else 64
    order = torch.arange(padded).view(-1, 4, block // 8, 2).transpose(1, 2).flatten()
    matrix = matrix[:, order]
    first = matrix.half()
    return torch.stack([first, (matrix - first.float()).half()]).to(device)
