"""Whether a kernel computes what a part of a model does, on a sample: only then it may take its place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

_STEPS = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
"""How far two roundings of one number may lie apart, relatively."""


def load_kernels(name: str, sample: torch.Tensor) -> Any:
    """A module of kernels; None without Triton, or where it does not serve tensors like `sample`."""
    try:
        kernels = import_module(f"turboquant_local.kernels.triton.{name}")
    except ImportError:  # there is no Triton
        return None
    return kernels if kernels.refusal(sample) is None else None


def is_norm(module: Any, kernels: Any, sample: torch.Tensor) -> bool:
    """Whether a module is a root mean square norm as the kernel computes it, and nobody else's hook is in its place.

    Its weight has the dtype of `sample`: a norm kept in float32 would turn its input into float32.
    """
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if weight is None or eps is None or weight.dim() != 1 or weight.dtype != sample.dtype or "forward" in vars(module):
        return False
    if len(inspect.signature(module.forward).parameters) != 1:  # the norms of recurrent layers take a gate too
        return False
    x = noise(2, weight.shape[0], like=weight)
    return close(module(x), kernels.rms_norm(x, weight, eps))


def rotates_alike(original: Callable[..., Any], kernels: Any, sample: torch.Tensor) -> bool:
    """Whether a rotary embedding is the kernel's, for tensors of the dtype and on the device of `sample`."""
    q, k = noise(1, 4, 1, 16, like=sample), noise(1, 2, 1, 16, like=sample)
    cos, sin = noise(1, 1, 16, like=sample, seed=1), noise(1, 1, 16, like=sample, seed=2)
    try:
        expected = original(q, k, cos, sin)
        return all(close(a, b) for a, b in zip(expected, kernels.rotary(q, k, cos, sin), strict=True))
    except (TypeError, ValueError, RuntimeError):  # it takes or returns other things
        return False


def noise(*shape: int, like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The same normal values at every call, of the dtype and on the device of `like`."""
    values = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return values.to(like.device, like.dtype)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results of products are the same but for roundings on the way."""
    return a.shape == b.shape and bool((a - b).norm() <= 4 * _STEPS[a.dtype] * b.norm())


def close(a: object, b: torch.Tensor) -> bool:
    """Whether every element is the same but for a rounding."""
    if not isinstance(a, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    step = _STEPS[a.dtype]
    return torch.allclose(a.float(), b.float(), rtol=step, atol=step)
