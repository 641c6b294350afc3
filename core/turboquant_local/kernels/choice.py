"""Which implementation runs an operation: Triton for CUDA tensors where it serves them, else the reference in torch.

An implementation asked for by name is used or refused with the reason, never quietly replaced. What torch does in place
of a kernel is logged once.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from turboquant_local.codec.quantizer import IdentityQuantizer
from turboquant_local.errors import BackendError
from turboquant_local.kernels import reference
from turboquant_local.kernels.layout import KVView

logger = logging.getLogger(__name__)
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
        reason = refusal(query, keys, values)
        if reason is not None:
            say_slower("attention", reason)
        return "triton" if reason is None else "reference"
    if impl == "triton":
        reason = refusal(query, keys, values)
        if reason is not None:
            raise BackendError(f"impl='triton': {reason}; use impl='reference', or 'auto'")
        return impl
    return plain(impl)


def refusal(query: torch.Tensor, keys: KVView, values: KVView) -> str | None:
    """Why Triton does not serve this call of `attention`, or None."""
    module = in_triton(attention_kernel(query))
    if isinstance(module, str):
        return module
    reason: str | None = module.refusal(query, keys, values)
    return reason


def attention_kernel(query: torch.Tensor) -> str:
    """Which of the two attentions in Triton is made for so many query tokens."""
    return "decode_attention" if query.shape[2] <= _FEW_QUERIES else "prefix_attention"


@lru_cache(maxsize=8)
def in_triton(operation: str) -> Any:
    """The module of an operation in Triton, or why there is none. Triton is imported on first use, never before."""
    try:
        import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install it, it comes with torch for CUDA"
    return import_module(f"turboquant_local.kernels.triton.{operation}")


def plain(impl: str) -> str:
    """Check the name of an implementation in torch alone."""
    if impl not in ("auto", "reference"):
        missing = isinstance(in_triton("decode_attention"), str)
        known = "reference" if missing else "reference and triton"
        raise BackendError(f"impl={impl!r}: this installation has {known}; use one, or 'auto'")
    return "reference"


def implementation(operation: str, impl: str, cuda: bool, *arguments: object) -> Any:
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
        plain(impl)
        return reference
    module = in_triton("dequantize" if operation == "dequantize" else "quantize")
    reason = module if isinstance(module, str) else getattr(module, f"{operation}_refusal")(*arguments)
    if reason is None:
        return module
    if impl == "triton":
        raise BackendError(f"impl='triton': {reason}; use impl='reference', or 'auto'")
    if not any(isinstance(getattr(x, "quantizer", x), IdentityQuantizer) for x in arguments):  # that is but a copy
        say_slower(operation, reason)
    return reference


@lru_cache(maxsize=64)
def say_slower(operation: str, reason: str) -> None:
    """Say once that torch does what a kernel should."""
    logger.warning("%s runs in torch, which is slower: %s", operation, reason)
