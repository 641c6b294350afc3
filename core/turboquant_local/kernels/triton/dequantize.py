"""Packed keys and values back to vectors, for attention that has no kernel of its own."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from turboquant_local.codec.grid import grid_step
from turboquant_local.codec.quantizer import MSEQuantizer
from turboquant_local.kernels.layout import PackedKV
from turboquant_local.kernels.triton.packing import load_scales
from turboquant_local.kernels.triton.quantize import DTYPES, packed_refusal, packed_source
from turboquant_local.kernels.triton.quantize_kernel import packed_levels

_TILE, _COLUMNS = 64, 64


def dequantize_refusal(packed: PackedKV, dtype: torch.dtype) -> str | None:
    """Why `dequantize_kv` does not serve this call, or None."""
    if dtype not in DTYPES:
        return f"dtype={dtype}: it serves {', '.join(map(str, DTYPES))}"
    return packed_refusal(packed)


def dequantize_kv(packed: PackedKV, dtype: torch.dtype) -> torch.Tensor:
    """See `kernels.api.dequantize_kv`; `dequantize_refusal` says what is served."""
    batch, heads, tokens = packed.codes.shape[:3]
    quantizer = packed.quantizer
    assert isinstance(quantizer, MSEQuantizer)
    head_dim = quantizer.head_dim
    out = torch.empty(batch, heads, tokens, head_dim, dtype=dtype, device=packed.codes.device)
    terms = _terms(quantizer, out.device)
    *source, strides = packed_source(packed)
    if tokens:
        _dequantize_tiles[(batch * heads, triton.cdiv(tokens, _TILE))](
            *source, out if packed.mean is None else packed.mean.contiguous(), terms, out,
            tokens, heads, *strides, grid_step(head_dim, quantizer.bits) / head_dim,
            D=head_dim, DP=terms.shape[1], BITS=quantizer.bits, MEAN=packed.mean is not None,
            TERMS=terms.shape[0], BT=_TILE, BLOCK=min(_COLUMNS, terms.shape[1]),
            num_warps=4,
        )  # fmt: skip
    return out


@lru_cache(maxsize=64)
def _terms(quantizer: MSEQuantizer, device: torch.device) -> torch.Tensor:
    """The rotation times head_dim as a sum of float16 matrices, `[terms, padded, padded]`.

    One term where it holds whole numbers (two rounds of Hadamard), else two.
    """
    head_dim = quantizer.head_dim
    padded = triton.next_power_of_2(head_dim)
    matrix = torch.zeros(padded, padded)
    matrix[:head_dim, :head_dim] = quantizer.constants(torch.device("cpu"))[0] * head_dim
    first = matrix.half()
    second = (matrix - first.float()).half()
    terms = [first] if second.abs().max() < 1e-4 else [first, second]
    return torch.stack(terms).to(device)


@triton.jit(do_not_specialize=["tokens", "heads", "factor"])
def _dequantize_tiles(
    codes, scales, units, mean, terms, out, tokens, heads,
    code_stride_b, code_stride_h, scale_stride_b, scale_stride_h, factor,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, MEAN: tl.constexpr, TERMS: tl.constexpr,
    BT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Unpack a tile of BT vectors.

    Args:
        codes: `[batch, heads, tokens, D * BITS / 8]` uint8.
        scales: `[batch, heads, tokens]` uint8 or float16.
        units: `[pairs]` float32, the units of 8-bit scales, or anything for float16.
        mean: `[pairs, D]` to add, or anything where MEAN is false.
        terms: See `_terms`.
        out: `[pairs, tokens, D]`.
        tokens: Vectors of a pair of sequence and head.
        heads: Heads.
        code_stride_b: Of the codes.
        code_stride_h: Likewise.
        scale_stride_b: Of the scales.
        scale_stride_h: Likewise.
        factor: What scales are to be multiplied by: the units of levels and terms.
        D: Size of a vector.
        DP: The next power of 2.
        BITS: 1, 2, 3, 4, 6 or 8.
        MEAN: Whether there is a mean.
        TERMS: How many there are.
        BT: Vectors of a tile.
        BLOCK: Channels at once.
    """
    pair = tl.program_id(0)
    token = tl.program_id(1) * BT + tl.arange(0, BT)[:, None]
    shown = token < tokens
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    unit = tl.load(units + pair) if scales.dtype.element_ty == tl.uint8 else 1.0
    scale = load_scales(scales + batch * scale_stride_b + head * scale_stride_h + token, unit, shown) * factor
    level = packed_levels(codes + batch * code_stride_b + head * code_stride_h, token, shown, BITS, D, DP)
    level = level.to(tl.float16)  # exactly
    at = out + (pair.to(tl.int64) * tokens + token) * D
    row = tl.arange(0, DP)[:, None] * DP
    for first in tl.range(0, DP, BLOCK, num_stages=1):
        channel = first + tl.arange(0, BLOCK)[None, :]
        x = tl.dot(level, tl.load(terms + row + channel))
        if TERMS == 2:
            x = tl.dot(level, tl.load(terms + DP * DP + row + channel), acc=x)
        x *= scale
        if MEAN:
            x += tl.load(mean + pair * D + channel, mask=channel < D, other=0.0).to(tl.float32)
        tl.store(at + channel, x.to(out.dtype.element_ty), mask=shown & (channel < D))
