"""Attention of a few query tokens over sinks, packed tokens and recent window, split over the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from turboquant_local.codec.quantizer import MSEQuantizer
from turboquant_local.kernels.layout import KVView, PackedKV
from turboquant_local.kernels.triton import assembly
from turboquant_local.kernels.triton.decode_kernels import partials
from turboquant_local.kernels.triton.devices import multiprocessors, unserved
from turboquant_local.kernels.triton.queries import combine, prepare

MAX_Q_LENGTH = 8
BITS = (1, 2, 3, 4, 6, 8, 16)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """How the work is cut up.

    Attributes:
        warps: Warps of a program; each has tokens of its own.
        tokens: Tokens a warp takes at once, a multiple of 32.
        stages: Tiles loaded ahead.
        waves: Programs wanted for every multiprocessor.
    """

    warps: int = 4
    tokens: int = 32
    stages: int = 3
    waves: int = 3


def refusal(query: torch.Tensor, keys: KVView, values: KVView) -> str | None:
    """Why this call is not served, or None."""
    if not keys.packed:
        return "nothing is packed"
    if not 1 <= query.shape[2] <= MAX_Q_LENGTH:
        return f"q_length={query.shape[2]}: it serves 1 to {MAX_Q_LENGTH} query tokens"
    reason = unserved(query.device)
    if reason is not None:
        return reason
    sides = [("keys", part) for part in keys.packed] + [("values", part) for part in values.packed]
    for name, side in sides:
        head_dim, bits = side.quantizer.head_dim, side.quantizer.bits
        if bits not in BITS or not (bits == 16 or isinstance(side.quantizer, MSEQuantizer)):
            return f"{name}: {bits} bits of {type(side.quantizer).__name__}: it reads {BITS} bits"
        if head_dim % 16 or not 64 <= head_dim <= 256:
            return f"{name}: head_dim={head_dim}: it serves multiples of 16 from 64 to 256"
    dtypes = {query.dtype, keys.recent.dtype, values.recent.dtype, keys.sinks.dtype, values.sinks.dtype}
    if len(dtypes) > 1 or query.dtype not in DTYPES:
        return f"dtypes {sorted(map(str, dtypes))}: it serves one of {', '.join(map(str, DTYPES))} for all"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, keys.recent, values.recent)):
        return "a gradient is wanted: it has none"
    return None


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
    group, rows = q_heads // kv_heads, batch * q_heads * q_length
    k_padded, v_padded = triton.next_power_of_2(k_dim), triton.next_power_of_2(v_dim)
    fast = not triton.knobs.runtime.interpret and query.dtype != torch.float32
    rows_at_once = 16 if group * q_length > 8 else 8
    chunks = triton.cdiv(group * q_length, rows_at_once)

    parts = list(zip(keys.packed, values.packed, strict=True))
    launches = [launch or _launch(k, v, query.dtype, batch * kv_heads * k.length) for k, v in parts]
    counts = []  # shares of every part
    for (k, _), chosen in zip(parts, launches, strict=True):
        tiles = triton.cdiv(k.length, chosen.warps * chosen.tokens)
        wanted = max(1, chosen.waves * multiprocessors(query.device) // (batch * kv_heads * chunks) - 1)
        counts.append(triton.cdiv(tiles, triton.cdiv(tiles, min(wanted, tiles))))
    shares = 1 + sum(counts)

    code_dtype = torch.float32 if query.dtype == torch.float32 else torch.float16
    coefficient, offset = query.new_empty(2, rows, dtype=torch.float32)
    code = query.new_empty(rows, k_dim, dtype=code_dtype)
    out = query.new_empty(rows, shares, v_dim, dtype=torch.float32)
    lse = query.new_empty(rows, shares, dtype=torch.float32)
    result = torch.empty(batch, q_heads, q_length, v_dim, dtype=query.dtype, device=query.device)

    first = keys.packed[0]  # all parts of a side share mean and rotation
    if first.quantizer.bits < 16:
        prepare[(rows, triton.cdiv(k_dim, 32))](
            query, _rotation(first), query if first.mean is None else first.mean.contiguous(), code, coefficient,
            offset, group * q_length, D=k_dim, DP=k_padded, COLUMNS=32, MEAN=first.mean is not None, num_warps=4,
        )  # fmt: skip
    mask_kind, mask, mask_strides = _mask(query, mask)
    unpacked = [x.contiguous() for x in (keys.sinks, keys.recent, values.sinks, values.recent)]
    position, share = keys.sinks.shape[2], 0
    for (k, v), chosen, count in zip(parts, launches, counts, strict=True):
        k_codes, k_scales, k_unit, k_table, k_layout, k_asm = _operands(k, fast)
        v_codes, v_scales, v_unit, v_table, v_layout, v_asm = _operands(v, fast)
        plain = share == 0
        partials[(batch * kv_heads, count + plain, chunks)](
            query, code, coefficient, offset, *unpacked,
            k_codes, k_scales, k_unit, k_table, v_codes, v_scales, v_unit, v_table,
            mask, query if keys.lengths is None else keys.lengths, out, lse,
            *k_codes.stride()[:2], *k_scales.stride()[:2], *v_codes.stride()[:2], *v_scales.stride()[:2],
            *mask_strides,
            keys.sinks.shape[2], k.length, keys.recent.shape[2], position, keys.shape[2], share, shares,
            scaling if softcap is not None else scaling * 1.4426950408889634, softcap or 0.0,
            KV_HEADS=kv_heads, GROUP=group, Q_LENGTH=q_length, ROWS=rows_at_once,
            KD=k_dim, KDP=k_padded, VD=v_dim, VDP=v_padded,
            K_BITS=k.quantizer.bits, V_BITS=v.quantizer.bits,
            K_ASM=k_asm, V_ASM=v_asm, MEAN=k.mean is not None, K_SCALES=k_layout, V_SCALES=v_layout, PLAIN=plain,
            PART=0 if keys.lengths is None else 1 if k is keys.far else 2,
            MASK=mask_kind, CAUSAL=causal, SOFTCAP=softcap is not None,
            W=chosen.warps, BN=chosen.tokens, STAGES=chosen.stages, num_warps=chosen.warps,
        )  # fmt: skip
        position, share = position + k.length, share + count + plain
    # With few queries, several programs share one; with many, none reads the shares twice.
    columns = 32 if rows < multiprocessors(query.device) else 2**14 // v_padded
    rotated = values.packed[0]
    combine[(rows, triton.cdiv(v_dim, columns))](
        out, lse, lse if sink_logits is None else sink_logits, _rotation(rotated), result, shares, q_heads, q_length,
        D=v_dim, DP=v_padded, SINK=sink_logits is not None, ROTATED=rotated.quantizer.bits < 16,
        SHARES=min(max(triton.next_power_of_2(shares), 64), 256), COLUMNS=min(columns, v_padded), num_warps=8,
    )  # fmt: skip
    return result


def _launch(k: PackedKV, v: PackedKV, dtype: torch.dtype, vectors: int) -> Launch:
    """A choice that fits registers and 96 KiB of shared memory; measured in benchmarks/NOTES.md."""
    if dtype == torch.float32:
        return Launch(warps=1, stages=1, waves=8)
    quantizers = (k.quantizer, v.quantizer)
    if max(x.bits for x in quantizers) in (6, 8):  # centroids are loaded one by one: no room for tiles loaded ahead
        return Launch(warps=1, stages=1, waves=8)
    if max(x.head_dim for x in quantizers) > 128 or max(x.bits for x in quantizers) > 4:
        return Launch(warps=2, stages=2, waves=4)
    if vectors >= 2**19:
        return Launch(warps=1, waves=8 if vectors < 2**21 else 16)
    return Launch(warps=2, waves=2) if vectors >= 2**15 else Launch(warps=4, stages=2, waves=2)


def _operands(
    packed: PackedKV, fast: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, str, str | None]:
    """Codes, scales, their units, table, layout of the scales, assembly; codes stand in for what there is not."""
    codes, quantizer = packed.codes, packed.quantizer
    if codes.stride(3) != 1 or codes.stride(2) != codes.shape[3]:
        codes = codes.contiguous()
    if packed.scales is None:
        return codes, codes.new_empty(1, 1, 2, dtype=torch.float16), codes, codes, "half", None
    scales = packed.scales if packed.scales.stride(2) == 1 else packed.scales.contiguous()
    unit = codes if packed.scale_unit is None else packed.scale_unit.contiguous()
    layout = "half" if packed.scale_unit is None else "byte"
    if _in_words(scales):
        scales, layout = scales.view(torch.int32), {"half": "halves", "byte": "bytes"}[layout]
    known = (
        isinstance(quantizer, MSEQuantizer) and quantizer.codebook == "lloyd_max" and quantizer.bits in assembly.BITS
    )
    asm = assembly.decoder(quantizer.head_dim, quantizer.bits) if fast and known else None
    return codes, scales, unit, quantizer.constants(codes.device)[1], layout, asm


def _rotation(packed: PackedKV) -> torch.Tensor:
    """The rotation; codes stand in for that of the identity codec."""
    constants = packed.quantizer.constants(packed.codes.device)
    return constants[0].contiguous() if constants else packed.codes


def _in_words(scales: torch.Tensor) -> bool:
    """Whether neighbouring scales can be read as one word of 4 bytes everywhere."""
    sizes = (scales.storage_offset(), scales.shape[2], scales.stride(0), scales.stride(1))
    return not any(size % (4 // scales.element_size()) for size in sizes)


def _mask(query: torch.Tensor, mask: torch.Tensor | None) -> tuple[str, torch.Tensor, tuple[int, ...]]:
    """Kind, tensor and strides of a mask; a stride of 0 repeats it."""
    if mask is None:
        return "none", query, (0, 0, 0, 0)
    kind = "bool" if mask.dtype == torch.bool else "float"
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride()[:3], strict=True)]
    return kind, mask.view(torch.uint8) if kind == "bool" else mask, (*strides, mask.stride(3))
