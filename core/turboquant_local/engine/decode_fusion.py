"""Fewer and faster launches for a step that is captured: norms, rotary embeddings and products with one token.

A graph holds kernels, not the Python that launched them. So what a model calls can be exchanged for as long as its step
is captured, and nothing is left of it in the model. Whatever does not compute what the kernel does, on a sample, keeps
its own operations.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from turboquant_local.engine.exchange import Rotary, exchange_forward, exchange_rotary, rotary_of
from turboquant_local.engine.fusion_checks import is_norm, load_kernels, near, noise, rotates_alike


@contextmanager
def fused(model: Any) -> Iterator[int]:
    """Exchange the norms, rotary embeddings and products of a model as long as the context lasts.

    Yields:
        How many were exchanged.
    """
    with ExitStack() as stack:
        sample = torch.empty(0, dtype=model.dtype, device=model.device)
        kernels, products = load_kernels("step", sample), load_kernels("products", sample)
        if kernels is None:
            yield 0
            return
        count = 0
        for module in model.modules():
            count += _exchange_sums(module, kernels, products, sample, stack)
            if is_norm(module, kernels, sample):
                forward = partial(kernels.rms_norm, weight=module.weight, eps=module.variance_epsilon)
                count += exchange_forward(module, lambda x, forward=forward: forward(x), stack)
            count += _exchange_products(module, products, sample, stack)
        files = {sys.modules[type(module).__module__] for module in model.modules()}
        for file in files:
            original = rotary_of(file)
            if original is not None and rotates_alike(original, kernels, sample):
                exchange_rotary(file, partial(_with_rotary, kernels=kernels, device=sample.device), stack)
                count += 1
        yield count


def _exchange_products(module: torch.nn.Module, kernels: Any, sample: torch.Tensor, stack: ExitStack) -> int:
    """Exchange a gated MLP, projections of the same token, or a single product; returns how many."""
    children: dict[str, Any] = dict(module.named_children())
    served = {name for name, child in children.items() if _is_linear(child, sample)}
    count = 0
    if {"gate_proj", "up_proj", "down_proj"} <= served and (gated := _gated_mlp(module, kernels)) is not None:
        _exchange(module, gated, stack)
        served -= {"gate_proj", "up_proj"}
        count += 1
    together: list[str] = [name for name in ("q_proj", "k_proj", "v_proj") if name in served]
    groups = [together, *([name] for name in sorted(served - set(together)))]
    for names in groups:
        layers = [children[name] for name in names]
        if len({(layer.in_features, layer.bias is None) for layer in layers}) == 1:
            product = _Product(layers, kernels)
            for index, layer in enumerate(layers):
                _exchange(layer, partial(product, index), stack)
            count += 1
    return count


def _exchange_sums(module: Any, kernels: Any, products: Any, sample: torch.Tensor, stack: ExitStack) -> int:
    """Exchange a layer of attention and gated MLP, each behind a norm, so that their sums take no launch of their own.

    Returns:
        1, or 0 if it is not one.
    """
    names = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    parts: dict[str, Any] = {name: getattr(module, name, None) for name in names}
    first, attention, second, mlp = parts.values()
    if attention is None or any("forward" in vars(part) for part in (module, attention)) or _hooked(second, mlp):
        return 0
    if not (is_norm(first, kernels, sample) and is_norm(second, kernels, sample)):
        return 0
    if not all(_is_linear(getattr(mlp, name, None), sample) for name in ("gate_proj", "up_proj", "down_proj")):
        return 0
    gated = _gated_mlp(mlp, products)
    if gated is None:
        return 0
    original = module.forward

    def with_attention(attention: Any) -> Callable[..., torch.Tensor]:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if args or hidden_states.numel() != hidden_states.shape[-1]:
                out: torch.Tensor = original(hidden_states, *args, **kwargs)
                return out
            attended, _ = attention(hidden_states=first(hidden_states), **kwargs)
            total, x = kernels.add_rms_norm(attended, hidden_states, second.weight, second.variance_epsilon)
            return gated(x, total)

        return forward

    # The model itself keeps its attention: another thread may be using it.
    other, halved = copy.copy(module), _Halved()
    other._modules = {**module._modules, "self_attn": halved}
    x = noise(1, 1, second.weight.shape[0], like=second.weight)
    try:
        alike = near(other(x), with_attention(halved)(x))
    except Exception:  # it takes or returns other things
        return 0
    return int(alike and exchange_forward(module, with_attention(attention), stack))


class _Halved(torch.nn.Module):
    """Stands for an attention that needs no cache."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return hidden_states / 2, None


def _exchange(module: torch.nn.Module, forward: Callable[..., torch.Tensor], stack: ExitStack) -> None:
    """Exchange what a module does for one token as long as the stack lasts."""
    original = module.forward

    def chosen(x: torch.Tensor) -> torch.Tensor:
        return forward(x) if x.numel() == x.shape[-1] else original(x)

    exchange_forward(module, chosen, stack)


class _Product:
    """Several layers' products with the same token by one launch, when the first of them is asked for its own."""

    def __init__(self, layers: list[Any], kernels: Any) -> None:
        self.layers, self.kernels = layers, kernels
        self.last: tuple[torch.Tensor | None, tuple[torch.Tensor, ...]] = (None, ())

    def __call__(self, index: int, x: torch.Tensor) -> torch.Tensor:
        known, out = self.last
        if x is not known:
            weights, biases = [layer.weight for layer in self.layers], [layer.bias for layer in self.layers]
            out = self.kernels.linear(x, weights, biases)
            self.last = (x, out)
        return out[index]


def _is_linear(module: Any, sample: torch.Tensor) -> bool:
    """Whether it is a linear layer and no more than that: not quantized, no adapter, nobody's hook."""
    return (
        type(module) is torch.nn.Linear
        and not (_hooked(module) or "forward" in vars(module))
        and type(module.weight) is torch.nn.Parameter  # quantized weights may be tensors of a class of their own
        and module.weight.is_contiguous()
        and (module.weight.dtype, module.weight.device) == (sample.dtype, sample.device)
    )


def _hooked(*modules: Any) -> bool:
    return any(module is not None and (module._forward_hooks or module._forward_pre_hooks) for module in modules)


def _gated_mlp(module: Any, kernels: Any) -> Callable[..., torch.Tensor] | None:
    """What a module computes if it is `down(activation(gate(x)) * up(x))`."""
    gate, up, down = module.gate_proj, module.up_proj, module.down_proj
    if "forward" in vars(module) or gate.bias is not None or up.bias is not None:
        return None
    x = noise(1, 1, gate.in_features, like=gate.weight)
    try:
        expected = module(x)
    except Exception:  # it takes other things
        return None
    for activation in kernels.ACTIVATIONS:

        def forward(x: torch.Tensor, residual: torch.Tensor | None = None, name: str = activation) -> torch.Tensor:
            inner = kernels.gated(x, gate.weight, up.weight, name)
            out: torch.Tensor = kernels.linear(inner, [down.weight], [down.bias], residual)[0]
            return out

        if near(forward(x), expected):
            return forward
    return None


def _with_rotary(original: Rotary, kernels: Any, device: torch.device) -> Rotary:
    def rotary(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        one = q.shape[:3:2] == k.shape[:3:2] == (1, 1) and cos.shape == sin.shape == (1, 1, q.shape[3])
        alike = q.dtype == k.dtype == cos.dtype and q.stride(3) == k.stride(3) == 1 and k.shape[3] == q.shape[3]
        # Another model, in another thread, may call it meanwhile.
        if one and alike and q.device == device and not args and not kwargs:
            both: tuple[torch.Tensor, torch.Tensor] = kernels.rotary(q, k, cos.contiguous(), sin.contiguous())
            return both
        return original(q, k, cos, sin, *args, **kwargs)

    return rotary
