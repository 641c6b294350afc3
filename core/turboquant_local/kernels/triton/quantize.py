"""Quantisation of keys and values on a uniform grid, in one pass; and from one number of bits to another."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import torch
import triton

from turboquant_local.codec.grid import FACTORS, grid_step
from turboquant_local.codec.packing import packed_size
from turboquant_local.codec.quantizer import MSEQuantizer, Quantizer
from turboquant_local.codec.statistics import HeadStatistics
from turboquant_local.kernels.layout import PackedKV
from turboquant_local.kernels.triton.devices import multiprocessors, unserved
from turboquant_local.kernels.triton.feedback_kernel import feedback_tiles, finish_tiles, weigh
from turboquant_local.kernels.triton.quantize_kernel import quantize_tiles, requantize_tiles

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OPTIONS = {"head_dim", "bits", "rotation", "scale", "seed", "scale_bits", "codebook"}
_READ_BITS = (1, 2, 3, 4, 6, 8)
_SCALES = ("norm", "unbiased", "least_error")


@dataclass(frozen=True)
class Launch:
    """How the work is cut up.

    Attributes:
        tile: Vectors a program takes at once.
        warps: Warps of a program.
        programs: Programs for every multiprocessor, at most.
        stages: Tiles on their way at once.
    """

    tile: int = 64
    warps: int = 4
    programs: int = 3
    stages: int = 1


def quantize_refusal(x: torch.Tensor, quantizer: Quantizer, statistics: HeadStatistics) -> str | None:
    """Why `quantize_kv` does not serve this call, or None."""
    reason = unserved(x.device) or _unknown(quantizer)
    if reason is not None:
        return reason
    if statistics.weights is not None:
        return "weights of channels are given: it rounds every coordinate by itself"
    if x.dtype not in DTYPES:
        return f"dtype={x.dtype}: it serves {', '.join(map(str, DTYPES))}"
    if statistics.mean is not None and statistics.mean.dtype != x.dtype:
        return f"mean.dtype={statistics.mean.dtype}: it serves that of x, {x.dtype}"
    if torch.is_grad_enabled() and x.requires_grad:
        return "a gradient is wanted: it has none"
    return None


def requantize_refusal(packed: PackedKV, quantizer: Quantizer, statistics: HeadStatistics) -> str | None:
    """Why `requantize_kv` does not serve this call, or None."""
    reason = packed_refusal(packed) or _unknown(quantizer)
    if reason is None and statistics.weights is not None and quantizer.head_dim > 128:
        return f"head_dim={quantizer.head_dim} with weights of channels: it serves up to 128"
    return reason


def packed_refusal(packed: PackedKV) -> str | None:
    """Why these tokens cannot be read, or None."""
    reason = unserved(packed.codes.device) or _unknown(packed.quantizer)
    if reason is None and packed.quantizer.bits not in _READ_BITS:
        return f"bits={packed.quantizer.bits}: it reads {', '.join(map(str, _READ_BITS))}"
    return reason


def packed_source(packed: PackedKV) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int, int, int]]:
    """Codes, scales and units (the codes, if none) as kernels read them; strides of the first two's batch and heads."""
    codes, scales, unit = packed.codes, packed.scales, packed.scale_unit
    assert scales is not None
    codes = codes if codes.stride()[2:] == (codes.shape[3], 1) else codes.contiguous()
    scales = scales if scales.stride(2) == 1 else scales.contiguous()
    strides = (codes.stride(0), codes.stride(1), scales.stride(0), scales.stride(1))
    return codes, scales, codes if unit is None else unit.contiguous(), strides


def _unknown(quantizer: Quantizer) -> str | None:
    if not isinstance(quantizer, MSEQuantizer):
        return f"{type(quantizer).__name__}: it serves the MSE quantizer"
    unknown = [f.name for f in fields(quantizer) if f.name not in _OPTIONS and getattr(quantizer, f.name)]
    if unknown or quantizer.scale not in _SCALES:
        return f"{', '.join(unknown) or 'scale=' + quantizer.scale}: it does not know this option of the quantizer"
    if quantizer.codebook != "grid":
        return f"codebook={quantizer.codebook}: it serves grid"
    if not 32 <= quantizer.head_dim <= 256:
        return f"head_dim={quantizer.head_dim}: it serves 32 to 256"
    return None


def quantize_kv(
    x: torch.Tensor, quantizer: Quantizer, statistics: HeadStatistics, launch: Launch | None = None
) -> PackedKV:
    """See `kernels.api.quantize_kv`; `quantize_refusal` says what is served."""
    assert isinstance(quantizer, MSEQuantizer)
    batch, heads, tokens, head_dim = x.shape
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:  # Triton's interpreter cannot multiply it
        x = x.float()
    x = x if x.stride(3) == 1 else x.contiguous()
    packed = _room(quantizer, statistics, batch, heads, tokens, x.device)
    if not tokens:
        return packed
    matrix, factor = _matrix(quantizer, x.dtype, x.device)
    padded = triton.next_power_of_2(head_dim)
    block = padded if matrix.dtype == x.dtype != torch.float32 and padded <= 128 else 32
    if launch is None:  # what refines its levels takes twice the registers
        launch = Launch(tile=64 if block == padded else 32, programs=3 if packed.scale_unit is None else 2)
    pairs = batch * heads
    each = max(1, launch.programs * multiprocessors(x.device) // pairs)
    quantize_tiles[(pairs, min(each, triton.cdiv(tokens, launch.tile)))](
        x, x if packed.mean is None else packed.mean.to(x.dtype).contiguous(), matrix,
        x if packed.scale_unit is None else packed.scale_unit.contiguous(), packed.codes, packed.scales,
        tokens, heads, *x.stride()[:3], factor / grid_step(head_dim, quantizer.bits),
        D=head_dim, DP=padded, BITS=quantizer.bits, SHARES=FACTORS.get(quantizer.bits, (1.0,)),
        SCALE=quantizer.scale, MEAN=packed.mean is not None, BLOCK=block, BT=launch.tile, STAGES=launch.stages,
        num_warps=launch.warps,
    )  # fmt: skip
    return packed


def requantize_kv(packed: PackedKV, quantizer: Quantizer, statistics: HeadStatistics) -> PackedKV:
    """See `kernels.api.requantize_kv`; `requantize_refusal` says what is served."""
    assert isinstance(quantizer, MSEQuantizer)
    assert packed.scales is not None
    batch, heads, tokens = packed.codes.shape[:3]
    near, head_dim = packed.quantizer, quantizer.head_dim
    out = _room(quantizer, statistics, batch, heads, tokens, packed.codes.device)
    if not tokens:
        return out
    *source, strides = packed_source(packed)
    if out.scale_unit is not None:  # that of both, where both have one
        source[2] = out.scale_unit.contiguous()
    sizes = (tokens, heads, *strides)
    factor = grid_step(head_dim, near.bits) / grid_step(head_dim, quantizer.bits)
    padded, pairs = triton.next_power_of_2(head_dim), batch * heads
    options = {
        "D": head_dim, "DP": padded, "NEAR_BITS": near.bits, "BITS": quantizer.bits,
        "SHARES": FACTORS.get(quantizer.bits, (1.0,)),
    }  # fmt: skip

    def grid(tile: int) -> tuple[int, int]:
        return pairs, triton.cdiv(tokens, tile)

    if statistics.weights is None:
        requantize_tiles[grid(32)](
            *source, out.codes, out.scales, *sizes, factor, **options, SCALE=quantizer.scale, BT=32, num_warps=4
        )
        return out
    passed_on, metric = _weighed(quantizer, statistics.weights, padded)
    rough = torch.empty_like(out.codes)
    tile = 64
    feedback_tiles[grid(tile)](*source, passed_on, rough, *sizes, **options, BT=tile, num_warps=4)
    finish_tiles[grid(tile)](
        *source, metric, rough, out.codes, out.scales, *sizes, factor, **options,
        SCALE=quantizer.scale, BT=tile, num_warps=4,
    )  # fmt: skip
    return out


def _weighed(quantizer: MSEQuantizer, weights: torch.Tensor, padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `feedback_kernel.weigh` makes of the weights of every head."""
    pairs = weights.shape[0] * weights.shape[1]
    passed_on = torch.empty(pairs, padded, padded, dtype=torch.float32, device=weights.device)
    metric = torch.empty(pairs, padded, padded, dtype=torch.float16, device=weights.device)
    weigh[(pairs,)](
        quantizer.constants(weights.device)[0], weights.contiguous(), passed_on, metric,
        D=quantizer.head_dim, DP=padded, BLOCK=32,
        num_warps=max(4, padded // 16),
    )  # fmt: skip
    return passed_on, metric


def _room(
    quantizer: MSEQuantizer, statistics: HeadStatistics, batch: int, heads: int, tokens: int, device: torch.device
) -> PackedKV:
    """Packed tokens still to be written."""
    size = packed_size(quantizer.head_dim, quantizer.bits)
    unit = statistics.scale_unit if quantizer.scale_bits == 8 else None
    scale_dtype = torch.float16 if unit is None else torch.uint8
    return PackedKV(
        quantizer,
        torch.empty(batch, heads, tokens, size, dtype=torch.uint8, device=device),
        torch.empty(batch, heads, tokens, dtype=scale_dtype, device=device),
        unit,
        statistics.mean,
    )


@lru_cache(maxsize=64)
def _matrix(quantizer: MSEQuantizer, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, float]:
    """The transposed rotation over a unit, `[padded, padded]`, and the unit.

    Two rounds of Hadamard give whole numbers over head_dim, which 16 bits hold exactly; where the rotation is another
    one, or vectors are float32, the matrix is float32. Columns are in the order of `quantize_kernel.rotated`: column
    8j + 2t + e of N is coordinate tN/4 + 2j + e.
    """
    head_dim = quantizer.head_dim
    padded = triton.next_power_of_2(head_dim)
    matrix = torch.zeros(padded, padded, dtype=torch.float64)
    matrix[:head_dim, :head_dim] = quantizer.constants(torch.device("cpu"))[0].T.double() * head_dim
    matrix = matrix[:, torch.arange(padded).view(4, padded // 8, 2).transpose(0, 1).flatten()]
    whole = matrix.round()
    if (matrix - whole).abs().max() < 1e-4 and whole.abs().max() <= 256:
        return whole.to(device, dtype), 1 / head_dim
    return matrix.to(device, torch.float32), 1 / head_dim
