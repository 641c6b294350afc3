"""The one door to the operations: meaning, shape checks and the choice of implementation.

An implementation asked for by name is used or refused with the reason, never quietly replaced.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from turboquant_local.codec.quantizer import IdentityQuantizer, Quantizer
from turboquant_local.codec.statistics import HeadStatistics
from turboquant_local.errors import BackendError, CacheError
from turboquant_local.kernels import reference
from turboquant_local.kernels.layout import KVView, PackedKV

logger = logging.getLogger(__name__)
_NOTHING = HeadStatistics()
_FEW_QUERIES = 8


def choose(query: torch.Tensor, keys: KVView, values: KVView, impl: str = "auto") -> str:
    """The name of the implementation of `attention` that will run.

    Args:
        query: As for `attention`.
        keys: Likewise.
        values: Likewise.
        impl: "auto" (Triton for CUDA tensors where it serves the shape, else the reference), or a name to insist on.

    Raises:
        BackendError: There is no such implementation here, or it does not serve these tensors.
    """
    if impl == "auto":
        if not (query.is_cuda and keys.packed):
            return "reference"
        reason = _refusal(query, keys, values)
        if reason is not None:
            _say_slower("attention", reason)
        return "triton" if reason is None else "reference"
    if impl == "triton":
        reason = _refusal(query, keys, values)
        if reason is not None:
            raise BackendError(f"impl='triton': {reason}; use impl='reference', or 'auto'")
        return impl
    return _plain(impl)


def _refusal(query: torch.Tensor, keys: KVView, values: KVView) -> str | None:
    module = _triton(_operation(query))
    if isinstance(module, str):
        return module
    reason: str | None = module.refusal(query, keys, values)
    return reason


def _operation(query: torch.Tensor) -> str:
    """Which of the two attentions in Triton is made for so many query tokens."""
    return "decode_attention" if query.shape[2] <= _FEW_QUERIES else "prefix_attention"


@lru_cache(maxsize=8)
def _triton(operation: str) -> Any:
    """The module of an operation in Triton, or why there is none. Triton is imported on first use, never before."""
    try:
        import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install it, it comes with torch for CUDA"
    return import_module(f"turboquant_local.kernels.triton.{operation}")


def _plain(impl: str) -> str:
    """Check the name of an implementation in torch alone."""
    if impl not in ("auto", "reference"):
        missing = isinstance(_triton("decode_attention"), str)
        known = "reference" if missing else "reference and triton"
        raise BackendError(f"impl={impl!r}: this installation has {known}; use one, or 'auto'")
    return "reference"


def _module(operation: str, impl: str, cuda: bool, *arguments: object) -> Any:
    """The implementation of packing or unpacking that is to run.

    Args:
        operation: "quantize", "requantize" or "dequantize".
        impl: As for `choose`.
        cuda: Whether the tensors are on a CUDA device.
        *arguments: Of the operation.

    Raises:
        BackendError: As for `choose`.
    """
    if impl != "triton" and not (impl == "auto" and cuda):
        _plain(impl)
        return reference
    module = _triton("dequantize" if operation == "dequantize" else "quantize")
    reason = module if isinstance(module, str) else getattr(module, f"{operation}_refusal")(*arguments)
    if reason is None:
        return module
    if impl == "triton":
        raise BackendError(f"impl='triton': {reason}; use impl='reference', or 'auto'")
    if not any(isinstance(getattr(x, "quantizer", x), IdentityQuantizer) for x in arguments):  # that is but a copy
        _say_slower(operation, reason)
    return reference


@lru_cache(maxsize=64)
def _say_slower(operation: str, reason: str) -> None:
    """Say once that torch does what a kernel should."""
    logger.warning("%s runs in torch, slower and with the same result: %s", operation, reason)


def _on(x: torch.Tensor) -> AbstractContextManager[object]:
    """Launch where the tensor is: Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def quantize_kv(
    x: torch.Tensor, quantizer: Quantizer, statistics: HeadStatistics = _NOTHING, *, impl: str = "auto"
) -> PackedKV:
    """Pack keys or values.

    Args:
        x: `[batch, num_kv_heads, tokens, head_dim]`, any float dtype.
        quantizer: The codec, for this head size.
        statistics: The mean to subtract first, weights of channels, the unit of 8-bit scales; each may be None.
        impl: Implementation.

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
    module = _module("quantize", impl, x.is_cuda, x, quantizer, statistics)
    with _on(x):
        packed: PackedKV = module.quantize_kv(x, quantizer, statistics)
    return packed


def requantize_kv(
    packed: PackedKV, quantizer: Quantizer, statistics: HeadStatistics = _NOTHING, *, impl: str = "auto"
) -> PackedKV:
    """Pack packed tokens again, in other bits. With the quantizer they have already they stay as they are.

    Args:
        packed: Tokens packed with the same rotation and statistics.
        quantizer: The codec to go to.
        statistics: As for `quantize_kv`.
        impl: Implementation.

    Raises:
        CacheError: 8-bit scales have no unit.
        BackendError: There is no such implementation here, or it does not serve these quantizers.
    """
    _check_unit(quantizer, statistics)
    if packed.quantizer == quantizer:
        return packed
    module = _module("requantize", impl, packed.codes.is_cuda, packed, quantizer, statistics)
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
    module = _module("dequantize", impl, packed.codes.is_cuda, packed, dtype)
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
        module = _triton("prompt_step")
        reason = module if isinstance(module, str) else module.refusal(first)
        if reason is None:
            with _on(first):
                out: torch.Tensor = module.merge(first, first_lse, second, second_lse)
            return out
        _say_slower("merging attention", reason)
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
    module = reference if choose(query, keys, values, impl) == "reference" else _triton(_operation(query))
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
        module = _triton("step")
        reason = module if isinstance(module, str) else module.write_refusal(k_window, v_window, k, v)
        if reason is None:
            with _on(k):
                module.write(k_window, v_window, slot, k, v)
            return
        _say_slower("writing a token", reason)
    k_window.index_copy_(2, slot, k)
    v_window.index_copy_(2, slot, v)
