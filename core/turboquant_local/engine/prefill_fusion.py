"""Fewer passes over memory for a prompt: some of a model's small operations, each as one kernel.

A tenth of the time of a long prompt goes to norms, rotary embeddings and gated activations, which PyTorch computes in
many passes; and a short prompt waits for Python to launch those. What a model calls can be exchanged for as long as a
prompt is run, and nothing is left of it in the model. Whatever does not compute what the kernel does, on a sample,
keeps its own operations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch

from turboquant_local.engine.exchange import Rotary, exchange_forward, exchange_rotary, rotary_of
from turboquant_local.engine.fusion_checks import close, is_norm, load_kernels, noise, rotates_alike

Forward = Callable[..., torch.Tensor]

_AT_ONCE: Final = 4096
"""Tokens a gated network takes at once: as fast as more, and what it computes on the way is wide."""

_found: WeakKeyDictionary[torch.nn.Module, tuple[list[tuple[torch.nn.Module, Forward]], set[ModuleType]]]
_found = WeakKeyDictionary()
"""What can be exchanged in a model, and the files it is written in. Looked for once: a sample waits for the device."""

_turns: WeakKeyDictionary[Rotary, bool] = WeakKeyDictionary()
"""What was found of rotary embeddings."""


@contextmanager
def fused(model: Any) -> Iterator[int]:
    """Exchange norms, rotary embeddings and gated networks of a model as long as the context lasts.

    Others may use the model meanwhile, for all computes the same; but no gradient comes out of it.

    Yields:
        How many were exchanged; none where Triton does not run.
    """
    with ExitStack() as stack:
        sample = torch.empty(0, dtype=model.dtype, device=model.device)
        kernels = load_kernels("prompt_step", sample)
        if kernels is None:
            yield 0
            return
        if model not in _found:
            files = {sys.modules[type(module).__module__] for module in model.modules()}
            # What another thread has found meanwhile stands: by now it may have exchanged that, and hidden it here.
            _found.setdefault(model, (_exchanges(model, kernels, sample), files))
        exchanges, files = _found[model]
        count = sum(exchange_forward(module, forward, stack) for module, forward in exchanges)
        for file in files:
            original = rotary_of(file)
            if original is not None and _turns_alike(original, kernels, sample):
                exchange_rotary(file, partial(_with_rotary, kernels=kernels), stack)
                count += 1
        yield count


@torch.no_grad()
def _exchanges(model: Any, kernels: Any, sample: torch.Tensor) -> list[tuple[torch.nn.Module, Forward]]:
    """Modules of a model with what computes the same in kernels, by the parts and weights they have when called."""
    known = [(module, _norm(module, kernels, sample)) for module in model.modules()]
    known = [(module, forward or _gated(module, kernels, sample)) for module, forward in known]
    return [(module, forward) for module, forward in known if forward is not None]


def _norm(module: Any, kernels: Any, sample: torch.Tensor) -> Forward | None:
    """What computes a module's result by the kernel, if it is a root mean square norm."""
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.cuda.device_of(x):
            out: torch.Tensor = kernels.rms_norm(x, module.weight, module.variance_epsilon)
        return out

    with torch.cuda.device_of(module.weight):
        return forward if is_norm(module, kernels, sample) else None


def _gated(module: Any, kernels: Any, sample: torch.Tensor) -> Forward | None:
    """The same for a network gated by a SiLU."""
    parts = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
    if not all(isinstance(part, torch.nn.Linear) for part in parts):
        return None

    def some(x: torch.Tensor) -> torch.Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        with torch.cuda.device_of(x):
            out: torch.Tensor = module.down_proj(kernels.swiglu(gate, up))
        return out

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2] <= _AT_ONCE:
            return some(x)
        out = torch.empty_like(x)
        for part, to in zip(x.split(_AT_ONCE, dim=-2), out.split(_AT_ONCE, dim=-2), strict=True):
            to.copy_(some(part))
        return out

    gate = module.gate_proj
    x = noise(2, gate.in_features, like=sample.to(gate.weight.device))
    try:
        return forward if "forward" not in vars(module) and close(module(x), forward(x)) else None
    except Exception:  # it takes or returns other things; quantized layers each have errors of their own
        return None


def _turns_alike(original: Rotary, kernels: Any, sample: torch.Tensor) -> bool:
    if original not in _turns:
        with torch.cuda.device_of(sample):
            _turns[original] = rotates_alike(original, kernels, sample)
    return _turns[original]


def _with_rotary(original: Rotary, kernels: Any) -> Rotary:
    def rotary(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Another model, in another thread, may call it meanwhile.
        shapes = q.shape[0] == k.shape[0] == 1 and cos.shape == sin.shape == (1, *q.shape[2:]) == (1, *k.shape[2:])
        alike = q.dtype == k.dtype == cos.dtype and q.stride(3) == k.stride(3) == 1 and q.device == k.device
        if shapes and alike and kernels.refusal(q) is None and not args and not kwargs:
            with torch.cuda.device_of(q):
                both: tuple[torch.Tensor, torch.Tensor] = kernels.rotary(q, k, cos.contiguous(), sin.contiguous())
            return both
        return original(q, k, cos, sin, *args, **kwargs)

    return rotary
