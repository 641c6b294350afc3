"""Fewer launches for a step that is captured: some of a model's small operations, each as one kernel.

A graph holds kernels, not the Python that launched them. So what a model calls can be exchanged for as long as its step
is captured, and nothing is left of it in the model. Whatever does not compute what the kernel does, on a sample, keeps
its own operations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch

_STEPS = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
"""How far two roundings of one number may lie apart, relatively."""


@contextmanager
def fused(model: Any) -> Iterator[int]:
    """Exchange the norms and rotary embeddings of a model as long as the context lasts.

    Yields:
        How many were exchanged.
    """
    with ExitStack() as stack:
        try:
            kernels = import_module("turboquant_local.kernels.triton.step")
        except ImportError:  # there is no Triton
            yield 0
            return
        sample = torch.empty(0, dtype=model.dtype, device=model.device)
        if kernels.refusal(sample) is not None:
            yield 0
            return
        count = 0
        for module in model.modules():
            if _is_norm(module, kernels):
                forward = partial(kernels.rms_norm, weight=module.weight, eps=module.variance_epsilon)
                module.forward = lambda x, forward=forward: forward(x)
                stack.callback(delattr, module, "forward")
                count += 1
        files = {sys.modules[type(module).__module__] for module in model.modules()}
        for file in files:
            original = getattr(file, "apply_rotary_pos_emb", None)
            if original is not None and _rotates_alike(original, kernels, sample):
                file.apply_rotary_pos_emb = _with_rotary(original, kernels, sample.device)  # type: ignore[attr-defined]
                stack.callback(setattr, file, "apply_rotary_pos_emb", original)
                count += 1
        yield count


def _is_norm(module: torch.nn.Module, kernels: Any) -> bool:
    """Whether a module is a root mean square norm as the kernel computes it, and nobody else's hook is in its place."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if weight is None or eps is None or weight.dim() != 1 or "forward" in vars(module):
        return False
    x = _noise(2, weight.shape[0], like=weight)
    return _close(module(x), kernels.rms_norm(x, weight, eps))


def _rotates_alike(original: Callable[..., Any], kernels: Any, sample: torch.Tensor) -> bool:
    q, k = _noise(1, 4, 1, 16, like=sample), _noise(1, 2, 1, 16, like=sample)
    cos, sin = _noise(1, 1, 16, like=sample, seed=1), _noise(1, 1, 16, like=sample, seed=2)
    try:
        expected = original(q, k, cos, sin)
        return all(_close(a, b) for a, b in zip(expected, kernels.rotary(q, k, cos, sin), strict=True))
    except (TypeError, ValueError, RuntimeError):  # it takes or returns other things
        return False


def _with_rotary(original: Callable[..., Any], kernels: Any, device: torch.device) -> Callable[..., Any]:
    def rotary(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        one = q.shape[:3:2] == k.shape[:3:2] == (1, 1) and cos.shape == sin.shape == (1, 1, q.shape[3])
        alike = q.dtype == k.dtype == cos.dtype and q.stride(3) == k.stride(3) == 1 and k.shape[3] == q.shape[3]
        # Another model, in another thread, may call it meanwhile.
        if one and alike and q.device == device and not args and not kwargs:
            return kernels.rotary(q, k, cos.contiguous(), sin.contiguous())
        return original(q, k, cos, sin, *args, **kwargs)

    return rotary


def _noise(*shape: int, like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(like.device, like.dtype)


def _close(a: object, b: torch.Tensor) -> bool:
    if not isinstance(a, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    step = _STEPS[a.dtype]
    return torch.allclose(a.float(), b.float(), rtol=step, atol=step)
