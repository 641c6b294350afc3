"""The one door to the operations: meaning and shape checks; `choice` says which implementation runs."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from turboquant_local.codec.quantizer import Quantizer
from turboquant_local.codec.statistics import HeadStatistics
from turboquant_local.errors import CacheError
from turboquant_local.kernels import reference
from turboquant_local.kernels.choice import attention_kernel, implementation, in_triton, say_slower
from turboquant_local.kernels.choice import choose as choose
from turboquant_local.kernels.layout import KVView, PackedKV

_NOTHING = HeadStatistics()


def _count(counted: Counter[str] | None, module: Any) -> None:
    if counted is not None:
        counted["reference" if module is reference else "triton"] += 1


def _on(x: torch.Tensor) -> AbstractContextManager[object]:
    """Launch where the tensor is: Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def quantize_kv(
    x: torch.Tensor,
    quantizer: Quantizer,
    statistics: HeadStatistics = _NOTHING,
    *,
    impl: str = "auto",
    counted: Counter[str] | None = None,
) -> PackedKV:
    """Pack keys or values.

    Args:
        x: `[batch, num_kv_heads, tokens, head_dim]`, any float dtype.
        quantizer: The codec, for this head size.
        statistics: The mean to subtract first, weights of channels, the unit of 8-bit scales; each may be None.
        impl: Implementation.
        counted: Where the name of the one that ran is counted.

    Raises:
        CacheError: The head size is not the quantizer's, or 8-bit scales have no unit.
        BackendError: There is no such implementation here, or it does not serve this quantizer.
    """
    if x.dim() != 4 or x.shape[-1] != quantizer.head_dim:
        raise CacheError(
            f"x of shape {tuple(x.shape)}: expected [batch, num_kv_heads, tokens, {quantizer.head_dim}]; "
            "build the quantizer for this head size"
        )
    _check_unit(quantizer, statistics)
    module = implementation("quantize", impl, x.is_cuda, x, quantizer, statistics)
    _count(counted, module)
    with _on(x):
        packed: PackedKV = module.quantize_kv(x, quantizer, statistics)
    return packed


def requantize_kv(
    packed: PackedKV,
    quantizer: Quantizer,
    statistics: HeadStatistics = _NOTHING,
    *,
    impl: str = "auto",
    counted: Counter[str] | None = None,
) -> PackedKV:
    """Pack packed tokens again, in other bits. With the quantizer they have already they stay as they are.

    Args:
        packed: Tokens packed with the same rotation and statistics.
        quantizer: The codec to go to.
        statistics: As for `quantize_kv`.
        impl: Implementation.
        counted: As for `quantize_kv`.

    Raises:
        CacheError: 8-bit scales have no unit.
        BackendError: There is no such implementation here, or it does not serve these quantizers.
    """
    _check_unit(quantizer, statistics)
    if packed.quantizer == quantizer:
        return packed
    module = implementation("requantize", impl, packed.codes.is_cuda, packed, quantizer, statistics)
    _count(counted, module)
    with _on(packed.codes):
        again: PackedKV = module.requantize_kv(packed, quantizer, statistics)
    return again


def _check_unit(quantizer: Quantizer, statistics: HeadStatistics) -> None:
    if quantizer.scale_bits == 8 and statistics.scale_unit is None:
        raise CacheError(
            "statistics.scale_unit=None: 8-bit scales need a unit; take it from a sample with head_statistics(...), "
            "or build the quantizer with scale_bits=16"
        )


def dequantize_kv(packed: PackedKV, dtype: torch.dtype, *, impl: str = "auto") -> torch.Tensor:
    """Unpack keys or values: `[batch, num_kv_heads, tokens, head_dim]` in `dtype`.

    Raises:
        BackendError: There is no such implementation here, or it does not serve this quantizer.
    """
    module = implementation("dequantize", impl, packed.codes.is_cuda, packed, dtype)
    with _on(packed.codes):
        x: torch.Tensor = module.dequantize_kv(packed, dtype)
    return x


def merge(first: torch.Tensor, first_lse: torch.Tensor, second: torch.Tensor, second_lse: torch.Tensor) -> torch.Tensor:
    """Attention to two sets of tokens, made of that to either.

    Args:
        first: `[batch, num_q_heads, q_length, head_dim]`, what the queries take from the first set, of unit stride in
            the last dimension.
        first_lse: `[batch, num_q_heads, q_length]` or one dimension more, the natural logarithm of the sum of its
            weights, float32.
        second: Likewise for the second set.
        second_lse: Likewise.

    Returns:
        As `first`, and laid out in memory as it is.
    """
    if first.is_cuda:
        module = in_triton("prompt_step")
        reason = module if isinstance(module, str) else module.refusal(first)
        if reason is None:
            with _on(first):
                out: torch.Tensor = module.merge(first, first_lse, second, second_lse)
            return out
        say_slower("merging attention", reason)
    share = torch.sigmoid(first_lse - second_lse).reshape(*first.shape[:3], 1)
    return torch.lerp(second.float(), first.float(), share).to(first.dtype)


def attention(
    query: torch.Tensor,
    keys: KVView,
    values: KVView,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = True,
    scaling: float | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Attend over sinks, packed tokens and recent window, without decompressing the packed ones as a whole.

    Args:
        query: `[batch, num_q_heads, q_length, head_dim]`; num_q_heads is a multiple of num_kv_heads.
        keys: Keys of kv_length tokens, oldest first; with `lengths`, kv_length is their sum, and shapes say how many
            there may be at most.
        values: Their values.
        mask: `[batch or 1, num_q_heads or 1, q_length or 1, kv_length or more]`: bool (True: visible) or float,
            added to the scores.
        causal: Without a mask, the last query sees all keys, the one before it all but the last, and so on.
        scaling: Factor of the scores; head_dim ** -0.5 when None.
        softcap: Scores become softcap * tanh(scores / softcap) (Gemma 2).
        sink_logits: `[num_q_heads]` logits that take part in the softmax and carry no value (gpt-oss).
        impl: Implementation.

    Returns:
        `[batch, num_q_heads, q_length, v_head_dim]` in the query's dtype. A query that may see nothing gets 0.

    Raises:
        CacheError: Shapes that do not fit together.
        BackendError: See `choose`.
    """
    batch, q_heads, q_length, head_dim = query.shape
    if (
        (batch, head_dim) != (keys.shape[0], keys.shape[3])
        or q_heads % keys.shape[1]
        or keys.shape[:3] != values.shape[:3]
    ):
        raise CacheError(
            f"query {tuple(query.shape)}, keys {keys.shape}, values {values.shape}: expected one batch size "
            "and head_dim, as many keys as values, and a multiple of their heads as queries"
        )
    if mask is not None and (mask.dim() != 4 or mask.shape[-1] < keys.shape[2]):
        raise CacheError(f"mask {tuple(mask.shape)}: expected 4 dimensions, the last of {keys.shape[2]} keys or more")
    if [part.length for part in keys.packed] != [part.length for part in values.packed]:
        raise CacheError("keys.packed, values.packed: expected parts of equal lengths; pack both sides together")
    if (keys.lengths is None) != (values.lengths is None):
        raise CacheError("keys.lengths, values.lengths: expected both or none; they say what both sides have in use")
    if any(part.mean is not None for part in values.packed):
        raise CacheError("values.packed: only keys can be centred; quantize the values without a mean")
    module = reference if choose(query, keys, values, impl) == "reference" else in_triton(attention_kernel(query))
    with _on(query):
        out: torch.Tensor = module.attention(
            query,
            keys,
            values,
            mask=mask,
            causal=causal and mask is None and q_length > 1,
            scaling=head_dim**-0.5 if scaling is None else scaling,
            softcap=softcap,
            sink_logits=sink_logits,
        )
    return out


def write_token(
    k_window: torch.Tensor, v_window: torch.Tensor, slot: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Put one token's keys and values into windows of recent tokens.

    Args:
        k_window: `[batch, num_kv_heads, tokens, head_dim]`.
        v_window: The same of values.
        slot: int64 `[1]` on their device: which of the tokens.
        k: `[batch, num_kv_heads, 1, head_dim]`.
        v: The values.
    """
    if k.is_cuda:
        module = in_triton("step")
        reason = module if isinstance(module, str) else module.write_refusal(k_window, v_window, k, v)
        if reason is None:
            with _on(k):
                module.write(k_window, v_window, slot, k, v)
            return
        say_slower("writing a token", reason)
    k_window.index_copy_(2, slot, k)
    v_window.index_copy_(2, slot, v)
