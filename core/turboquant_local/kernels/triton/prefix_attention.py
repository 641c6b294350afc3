"""Attention of many query tokens over sinks, packed tokens and recent window; nothing is decompressed in memory."""

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
        far or near, near or far, mask, query if sink_logits is None else sink_logits, rotated, out, lse,
        scaling if softcap is not None else scaling * 1.4426950408889634, softcap or 0.0,
        q_length, keys.sinks.shape[2], *(part.length if part else 0 for part in (keys.far, keys.near)),
        keys.recent.shape[2], *far_strides, *near_strides, *mask_strides,
        KV_HEADS=kv_heads, GROUP=group, KD=k_dim, KDP=k_padded, VD=v_dim, VDP=v_padded,
        FAR=far_kind, NEAR=near_kind,
        K_ORDER=slots(k_part.quantizer.bits, k_padded), V_ORDER=slots(v_part.quantizer.bits, v_padded),
        MEAN=k_part.mean is not None, MASK=mask_kind, CAUSAL=causal, SOFTCAP=softcap is not None,
        SINK=sink_logits is not None, K_TERMS=k_terms, V_TERMS=v_terms,
        Q_TERMS=1 if query.dtype == torch.bfloat16 else 2, SHARES=shares,
        BM=launch.rows, BN=launch.tokens, COLUMNS=min(64, k_padded),
        STAGES=launch.stages, FAST=fast, WARPS=launch.warps, KEEP=launch.keep,
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
    return (weights.unsqueeze(-1) * out).sum(0).to(dtype)


Kind = tuple[int, bool, int, bool]


def _operands(k: PackedKV | None, v: PackedKV | None) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...], Kind | None]:
    """Codes, scales, their units and table of keys and of values, their strides, and how they are read.

    Decoded values are held relative to the unit, so scales of 16 bits get one too: their largest. Codes stand in for
    what there is not.
    """
    if k is None or v is None:
        return (), (0, 0, 0, 0), None
    codes, codes_strides = _alike(k.codes, v.codes)
    scales, scales_strides = _alike(*(part.scales for part in (k, v) if part.scales is not None))
    rest = iter(scales)
    tensors: tuple[torch.Tensor, ...] = ()
    for part, own in zip((k, v), codes, strict=True):
        if part.scales is None:
            tensors += (own, own, own, own)
            continue
        scale, unit = next(rest), part.scale_unit
        unit = scale.amax(2).float().clamp_min(1e-20) if unit is None else unit.contiguous()
        tensors += (own, scale, unit, part.quantizer.constants(own.device)[1])
    k_grid, v_grid = (isinstance(x, MSEQuantizer) and x.codebook == "grid" for x in (k.quantizer, v.quantizer))
    return tensors, (*codes_strides, *scales_strides), (k.quantizer.bits, k_grid, v.quantizer.bits, v_grid)


def _alike(*tensors: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[int, int]]:
    """Tensors `[batch, heads, tokens, ...]`, copied unless they lie alike and a head's tokens in one piece.

    Returns:
        The tensors, and how many tokens lie between sequences and between heads.
    """
    strides: set[tuple[float, float]] = set()
    for x in tensors:
        size = x.shape[3] if x.dim() == 4 else 1
        whole = x.stride()[2:] == (size, 1)[: x.dim() - 2]
        strides.add((x.stride(0) / size, x.stride(1) / size) if whole else (-0.5, -0.5))
    if len(strides) == 1:
        batch, head = strides.pop()
        if batch.is_integer() and head.is_integer():
            return tensors, (int(batch), int(head))
    heads, tokens = tensors[0].shape[1:3] if tensors else (0, 0)
    return tuple(x.contiguous() for x in tensors), (heads * tokens, tokens)
