"""Attention of many query tokens over sinks, packed tokens and recent window, without decompressing anything in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from turboquant_local.codec.quantizer import MSEQuantizer
from turboquant_local.kernels.layout import KVView, PackedKV
from turboquant_local.kernels.triton import decode_attention
from turboquant_local.kernels.triton.codes import slots
from turboquant_local.kernels.triton.decode_attention import mask_operand, rotation_terms
from turboquant_local.kernels.triton.devices import multiprocessors
from turboquant_local.kernels.triton.prefix_kernel import attend


_WAVES = 2
_LEAST_TILES = 4


@dataclass(frozen=True)
class Launch:
    """How the work is cut up.

    Attributes:
        rows: Queries of a program, counting all query heads of a KV head.
        tokens: Tokens a tile.
        warps: Warps of a program.
        stages: Tiles loaded ahead.
        registers: Most of a thread, or 0 for the compiler's choice.
        shares: Into how many programs to cut the tokens of one; 0 for as many as fill the GPU.
    """

    rows: int = 64
    tokens: int = 64
    warps: int = 4
    stages: int = 3
    registers: int = 168
    shares: int = 0
    keep: bool = False


def refusal(query: torch.Tensor, keys: KVView, values: KVView) -> str | None:
    """Why this call is not served, or None."""
    if keys.lengths is not None:
        return "lengths on the device: it reads whole tensors"
    return decode_attention.unserved_operands(query, keys, values)


def attention(
    query: torch.Tensor,
    keys: KVView,
    values: KVView,
    *,
    mask: torch.Tensor | None,
    causal: bool,
    scaling: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    launch: Launch | None = None,
) -> torch.Tensor:
    """See `kernels.api.attention`; `refusal` says what is served."""
    query = query.contiguous()
    batch, q_heads, q_length, k_dim = query.shape
    kv_heads, v_dim = values.shape[1], values.shape[3]
    group, pairs = q_heads // kv_heads, batch * kv_heads
    k_padded, v_padded = triton.next_power_of_2(k_dim), triton.next_power_of_2(v_dim)
    fast = not triton.knobs.runtime.interpret and query.dtype != torch.float32
    launch = launch or _launch(query, max(k_padded, v_padded))
    blocks = triton.cdiv(group * q_length, launch.rows)
    shares = launch.shares or _shares(keys, blocks * pairs, launch.tokens, multiprocessors(query.device))

    result = query.new_empty(batch, q_heads, q_length, v_dim)
    out = query.new_empty(shares, *result.shape, dtype=torch.float32) if shares > 1 else result
    lse = query.new_empty(out.shape[:-1], dtype=torch.float32)
    coded = torch.float32 if query.dtype == torch.float32 else torch.float16
    rotated = query.new_empty(*query.shape[:3], k_padded, dtype=coded)
    mask_kind, mask, mask_strides = mask_operand(query, mask)
    far, far_strides, far_kind = _operands(keys.far, values.far)
    near, near_strides, near_kind = _operands(keys.near, values.near)
    k_part, v_part = keys.packed[0], values.packed[0]  # all parts of a side share mean and rotation
    k_rotation, k_terms = rotation_terms(k_part, fast)
    v_rotation, v_terms = rotation_terms(v_part, fast)
    attend[(blocks, pairs, shares)](
        query, k_rotation, v_rotation, query if k_part.mean is None else k_part.mean.contiguous(),
        tuple(x.contiguous() for x in (keys.sinks, keys.recent, values.sinks, values.recent)),
        far or near, far_strides or near_strides, near or far, near_strides or far_strides, mask, mask_strides,
        query if sink_logits is None else sink_logits, rotated, out, lse,
        (keys.sinks.shape[2], *(part.length if part else 0 for part in (keys.far, keys.near)), keys.recent.shape[2]),
        q_length, scaling if softcap is not None else scaling * 1.4426950408889634, softcap or 0.0,
        KV_HEADS=kv_heads, GROUP=group, KD=k_dim, KDP=k_padded, VD=v_dim, VDP=v_padded,
        FAR=far_kind, NEAR=near_kind,
        K_ORDER=slots(k_part.quantizer.bits, k_padded), V_ORDER=slots(v_part.quantizer.bits, v_padded),
        MEAN=k_part.mean is not None, MASK=mask_kind, CAUSAL=causal, SOFTCAP=softcap is not None,
        SINK=sink_logits is not None, K_TERMS=k_terms, V_TERMS=v_terms,
        Q_TERMS=1 if query.dtype == torch.bfloat16 else 2, SHARES=shares,
        BM=launch.rows, BN=launch.tokens, COLUMNS=min(64, k_padded), STAGES=launch.stages, FAST=fast, WARPS=launch.warps, KEEP=launch.keep,
        num_warps=launch.warps, **({"maxnreg": launch.registers} if launch.registers else {}),
    )  # fmt: skip
    return result if shares == 1 else _merged(out, lse, query.dtype)


def _launch(query: torch.Tensor, padded: int) -> Launch:
    """A choice that fits registers and shared memory; measured in benchmarks/NOTES.md."""
    if query.dtype == torch.float32:  # without tensor cores
        return Launch(rows=16, tokens=32, stages=1, registers=0)
    return Launch(tokens=32, warps=8, stages=2, registers=0) if padded > 128 else Launch()


def _shares(keys: KVView, programs: int, tile: int, processors: int) -> int:
    """Enough for two programs a multiprocessor; a power of 2, for each is compiled."""
    shares = 1
    while 2 * shares * programs <= _WAVES * processors and 2 * shares * _LEAST_TILES * tile <= keys.shape[2]:
        shares *= 2
    return shares


def _merged(out: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The shares' results by the logarithms (base 2) of their sums."""
    weights = torch.exp2(lse - lse.amax(0).clamp_min(-1e30))
    weights /= weights.sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.linalg.vecdot(out.movedim(0, -1), weights.movedim(0, -1).unsqueeze(-2)).to(dtype)


Kind = tuple[int, bool, int, bool]


def _operands(
    k: PackedKV | None, v: PackedKV | None
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...], Kind | None]:
    """Codes, scales, their units and table of both sides, strides, and how they are read."""
    if k is None or v is None:
        return (), (), None
    tensors: tuple[torch.Tensor, ...] = ()
    strides: tuple[int, ...] = ()
    kind: list[int] = []
    for part in (k, v):
        codes, scales, unit, table = _side(part)
        tensors += (codes, scales, unit, table)
        strides += (*(stride // codes.shape[3] for stride in codes.stride()[:2]), *scales.stride()[:2])
        grid = isinstance(part.quantizer, MSEQuantizer) and part.quantizer.codebook == "grid"
        kind += [part.quantizer.bits, grid]
    return tensors, strides, (kind[0], bool(kind[1]), kind[2], bool(kind[3]))


def _side(packed: PackedKV) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, their units, table; codes stand in for what there is not.

    Decoded values are held relative to the unit, so scales of 16 bits get one too: their largest.
    """
    codes = packed.codes
    size = codes.shape[3]
    if codes.stride(3) != 1 or codes.stride(2) != size or codes.stride(0) % size or codes.stride(1) % size:
        codes = codes.contiguous()
    if packed.scales is None:
        return codes, codes, codes, codes
    scales = packed.scales if packed.scales.stride(2) == 1 else packed.scales.contiguous()
    unit = packed.scale_unit
    unit = scales.amax(2).float().clamp_min(1e-20) if unit is None else unit.contiguous()
    return codes, scales, unit, packed.quantizer.constants(codes.device)[1]
