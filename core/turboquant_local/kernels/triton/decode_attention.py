"""Attention of a few query tokens over sinks, packed tokens and recent window, split over the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from turboquant_local.codec.quantizer import MSEQuantizer
from turboquant_local.codec.shared import shared
from turboquant_local.kernels.layout import KVView, PackedKV
from turboquant_local.kernels.triton.decode_kernels import attend
from turboquant_local.kernels.triton.devices import copies_tiles, counters, launch_early, multiprocessors, unserved

MAX_Q_LENGTH = 8
BITS = (1, 2, 3, 4, 6, 8, 16)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BRANCH = 8
"""Shares of far tokens that are merged first where they are too many to be merged at once."""


@dataclass(frozen=True)
class Launch:
    """How the work is cut up.

    Attributes:
        warps: Warps of a program; each has tokens of its own.
        tokens: Tokens a warp takes at once, a multiple of 32.
        stages: Tiles loaded ahead.
        waves: Programs wanted for every multiprocessor.
        near: Programs for the near tokens of one KV head, at most.
        registers: Of a thread, at most; 0 for as many as the compiler likes.
        sides: 2 for far tiles twice as large whose halves share the tensor core's columns, where queries leave half of
            them free.
        copies: Whether the copy engine brings far tiles, where it can.
        others: Far tiles that take about as long as a program's work besides them.
    """

    warps: int = 4
    tokens: int = 32
    stages: int = 3
    waves: float = 2
    near: int = 3
    registers: int = 0
    sides: int = 1
    copies: bool = False
    others: int = 4


def refusal(query: torch.Tensor, keys: KVView, values: KVView) -> str | None:
    """Why this call is not served, or None."""
    if not 1 <= query.shape[2] <= MAX_Q_LENGTH:
        return f"q_length={query.shape[2]}: it serves 1 to {MAX_Q_LENGTH} query tokens"
    return unserved_operands(query, keys, values)


def unserved_operands(query: torch.Tensor, keys: KVView, values: KVView) -> str | None:
    """Why no attention over packed tokens serves them, or None."""
    if not keys.packed:
        return "nothing is packed"
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
    group, pairs = q_heads // kv_heads, batch * kv_heads
    k_padded, v_padded = triton.next_power_of_2(k_dim), triton.next_power_of_2(v_dim)
    fast = not triton.knobs.runtime.interpret and query.dtype != torch.float32
    rows_at_once = 16 if group * q_length > 8 else 8
    chunks = triton.cdiv(group * q_length, rows_at_once)

    launch = launch or _launch(query, keys, values)
    coded = all(part is not None and part.quantizer.bits < 16 for part in (keys.far, values.far))
    sides = launch.sides if coded and group * q_length * launch.sides <= 8 else 1
    tile = launch.warps * launch.tokens * sides
    far_tiles = triton.cdiv(keys.far.length, tile) if keys.far else 0
    near_tiles = triton.cdiv(keys.near.length, tile // sides) if keys.near else 0
    programs = max(1, int(launch.waves * multiprocessors(query.device)) // (pairs * chunks))
    near_shares = min(near_tiles, launch.near, max(1, programs - 1))
    others = 1 + near_shares
    apart, sharing = others, max(0, min(programs - others, far_tiles))
    together = triton.cdiv(far_tiles + others * launch.others, max(programs, others))  # tiles of a program at most
    if far_tiles and (sharing == 0 or triton.cdiv(far_tiles, sharing) > together):
        apart, sharing = 0, max(programs, others)
    elif far_tiles:
        sharing = triton.cdiv(far_tiles, triton.cdiv(far_tiles, sharing))

    most_rows = triton.next_power_of_2(min(group * q_length, rows_at_once))
    room = launch.warps * 32 * (launch.registers // 4 or 128) // (v_padded * most_rows)  # shares that registers hold
    at_once = max(1, 36 if room >= 32 else room)
    branches = 0 if others + sharing <= at_once + 1 else triton.cdiv(sharing, _BRANCH)
    shares = others + branches + sharing
    out = query.new_empty(pairs * chunks * shares, v_padded, most_rows, dtype=torch.float32)
    lse = query.new_empty(pairs * chunks * shares, most_rows, dtype=torch.float32)
    result = torch.empty(batch, q_heads, q_length, v_dim, dtype=query.dtype, device=query.device)

    mask_kind, mask, mask_strides = mask_operand(query, mask)
    far, far_strides, far_kind = _operands(keys.far, values.far)
    near, near_strides, near_kind = _operands(keys.near, values.near)
    k_part, v_part = keys.packed[0], values.packed[0]  # all parts of a side share mean and rotation
    k_rotation, k_terms = rotation_terms(k_part, fast)
    v_rotation, v_terms = fragments(v_part, fast)
    tiles = (None, None)
    if launch.copies and far_tiles > 1 and _copyable(far[0], far[4], far_kind, k_dim, v_dim, sides):
        tiles = _tiles(far[0], tile), _tiles(far[4], tile)
    attend[(pairs, apart + sharing, chunks)](
        query, k_rotation, query if k_part.mean is None else k_part.mean.contiguous(),
        tuple(x.contiguous() for x in (keys.sinks, keys.recent, values.sinks, values.recent)),
        far or near, near or far, *tiles, mask, query if keys.lengths is None else keys.lengths,
        out, lse, counters(query.device, pairs * chunks * (1 + branches)),
        query if sink_logits is None else sink_logits, v_rotation, result,
        *(far_strides or near_strides), *(near_strides or far_strides), *mask_strides,
        keys.sinks.shape[2], *(part.length if part else 0 for part in (keys.far, keys.near)), keys.recent.shape[2],
        near_shares, apart, launch.others,
        scaling if softcap is not None else scaling * 1.4426950408889634, softcap or 0.0,
        KV_HEADS=kv_heads, GROUP=group, Q_LENGTH=q_length, ROWS=rows_at_once, NR=most_rows,
        KD=k_dim, KDP=k_padded, VD=v_dim, VDP=v_padded,
        FAR=far_kind, NEAR=near_kind, MEAN=k_part.mean is not None, LENGTHS=keys.lengths is not None,
        MASK=mask_kind, CAUSAL=causal, SOFTCAP=softcap is not None,
        K_TERMS=k_terms, V_TERMS=v_terms, Q_TERMS=1 if query.dtype == torch.bfloat16 else 2,
        SINK=sink_logits is not None,
        W=launch.warps, BN=launch.tokens, SIDES=sides, STAGES=launch.stages, FAST=fast,
        COLUMNS=min(k_padded, launch.warps * 2**12 // k_padded),
        BRANCH=_BRANCH if branches else 0, SHARES=at_once, AGAIN=others + branches > at_once + 1,
        V_COLUMNS=min(v_padded, launch.warps * 2**12 // v_padded) if v_part.quantizer.bits < 16 else v_padded,
        num_warps=launch.warps, **({"maxnreg": launch.registers} if launch.registers else {}),
        **launch_early(query.device),
    )  # fmt: skip
    return result


def _copyable(k: torch.Tensor, v: torch.Tensor, kind: Kind | None, k_dim: int, v_dim: int, sides: int) -> bool:
    """Whether the copy engine can bring tiles of these codes: rows of 128 bytes, which `copied_tiles` can read."""
    if kind is None or not copies_tiles(k.device):
        return False
    if any(x.data_ptr() % 16 or x.stride(0) % 16 or x.stride(1) % 16 for x in (k, v)):
        return False
    if kind[0] == kind[3] == 3:
        return sides == 2 and k_dim == v_dim == 128
    return {kind[0], kind[3]} <= {2, 4, 8} and k_dim in (64, 128) and v_dim in (64, 128)


def _tiles(codes: torch.Tensor, tokens: int) -> TensorDescriptor:
    """Tiles of so many tokens, of three-bit codes a third of every 16 bytes."""
    words = codes.view(torch.uint16)
    batch, heads, length, size = words.shape
    row = 8 * size if size == 24 else 64
    shape, strides = [batch, heads, length * size // row, row], [words.stride(0), words.stride(1), row, 1]
    return TensorDescriptor(words, shape, strides, [1, 1, tokens * size // row, 64])


def _launch(query: torch.Tensor, keys: KVView, values: KVView) -> Launch:
    """A choice that fits registers and shared memory; measured in benchmarks/NOTES.md."""
    far = keys.far.length * keys.shape[0] * keys.shape[1] if keys.far else 0
    each = far / multiprocessors(query.device)
    quantizers = [part.quantizer for part in (*keys.packed, *values.packed)]
    if query.dtype == torch.float32 or any(isinstance(x, MSEQuantizer) and x.codebook != "grid" for x in quantizers):
        return Launch(stages=1)
    if max(x.head_dim for x in quantizers) > 128 or max(x.bits for x in quantizers) > 8:
        return Launch(stages=2)
    few = query.shape[1] // keys.shape[1] * query.shape[2] <= 4
    bits = max((x.quantizer.bits for x in (keys.far, values.far) if x), default=16)
    if few and each >= 1_500 and bits <= 4:
        return Launch(sides=2, copies=True, stages=2 if each < 11_000 and bits > 2 else 3, others=3)
    return Launch(others=6) if each < 11_000 else Launch(waves=3, registers=168)


Kind = tuple[int, bool, str, int, bool, str]


def _operands(k: PackedKV | None, v: PackedKV | None) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...], Kind | None]:
    """Codes, scales, their units and table of both sides, strides (of codes in vectors), and how they are read."""
    if k is None or v is None:
        return (), (), None
    (*k_tensors, k_layout), (*v_tensors, v_layout) = _side(k), _side(v)
    strides = []
    for codes, scales in (k_tensors[:2], v_tensors[:2]):
        strides += [stride // codes.shape[3] for stride in codes.stride()[:2]] + list(scales.stride()[:2])
    k_grid, v_grid = (isinstance(x, MSEQuantizer) and x.codebook == "grid" for x in (k.quantizer, v.quantizer))
    kind = (k.quantizer.bits, k_grid, k_layout, v.quantizer.bits, v_grid, v_layout)
    return (*k_tensors, *v_tensors), tuple(strides), kind


def _side(packed: PackedKV) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, str]:
    """Codes, scales, their units, table, layout of the scales; codes stand in for what there is not."""
    codes = packed.codes
    size = codes.shape[3]
    if codes.stride(3) != 1 or codes.stride(2) != size or codes.stride(0) % size or codes.stride(1) % size:
        codes = codes.contiguous()
    if packed.scales is None:
        return codes, codes.new_empty(1, 1, 2, dtype=torch.float16), codes, codes, "half"
    scales = packed.scales if packed.scales.stride(2) == 1 else packed.scales.contiguous()
    unit = codes if packed.scale_unit is None else packed.scale_unit.contiguous()
    layout = "half" if packed.scale_unit is None else "byte"
    if _in_words(scales):
        scales, layout = scales.view(torch.int32), {"half": "halves", "byte": "bytes"}[layout]
    return codes, scales, unit, packed.quantizer.constants(codes.device)[1], layout


def rotation_terms(packed: PackedKV, fast: bool) -> tuple[torch.Tensor, int]:
    """The rotation as its terms, and how many there are; codes stand in for that of the identity codec."""
    if not isinstance(packed.quantizer, MSEQuantizer):
        return packed.codes, 1
    return _terms(packed.quantizer, packed.codes.device, fast)


def fragments(packed: PackedKV, fast: bool) -> tuple[torch.Tensor, int]:
    """As `rotation_terms`, the inverse rotation as a tensor core takes its left operand: every lane's 8 of a tile.

    A tile has 16 rows and columns; lane 4g + t has elements 2t and 2t + 1 of rows g and g + 8, then 2t + 8 and 2t + 9.
    """
    if not isinstance(packed.quantizer, MSEQuantizer):
        return packed.codes, 1
    return _fragments(packed.quantizer, packed.codes.device, fast)


@shared
def _fragments(quantizer: MSEQuantizer, device: torch.device, fast: bool) -> tuple[torch.Tensor, int]:
    matrix, terms = _terms(quantizer, device, fast)
    size = triton.next_power_of_2(quantizer.head_dim)
    padded = torch.nn.functional.pad(matrix.mT, (0, size - quantizer.head_dim) * 2)
    tiles = padded.view(terms, size // 16, 2, 8, size // 16, 2, 4, 2)
    return tiles.permute(0, 1, 4, 3, 6, 5, 2, 7).contiguous(), terms


@shared
def _terms(quantizer: MSEQuantizer, device: torch.device, fast: bool) -> tuple[torch.Tensor, int]:
    matrix = quantizer.constants(torch.device("cpu"))[0].contiguous()
    if not fast:
        return matrix.to(device), 1
    high = matrix.bfloat16()
    rest = matrix - high.float()
    terms = [high] if rest.abs().max() < 1e-6 else [high, rest.bfloat16()]
    return torch.stack(terms).to(device), len(terms)


def _in_words(scales: torch.Tensor) -> bool:
    """Whether neighbouring scales can be read as one word of 4 bytes everywhere."""
    sizes = (scales.storage_offset(), scales.shape[2], scales.stride(0), scales.stride(1))
    return not any(size % (4 // scales.element_size()) for size in sizes)


def mask_operand(query: torch.Tensor, mask: torch.Tensor | None) -> tuple[str, torch.Tensor, tuple[int, ...]]:
    """Kind, tensor and strides of a mask; a stride of 0 repeats it."""
    if mask is None:
        return "none", query, (0, 0, 0, 0)
    kind = "bool" if mask.dtype == torch.bool else "float"
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride()[:3], strict=True)]
    return kind, mask.view(torch.uint8) if kind == "bool" else mask, (*strides, mask.stride(3))
