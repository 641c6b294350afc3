"""Something else in place of what a model calls, for a while: others may use the model, and exchange too, meanwhile.

What is exchanged already is left alone, whoever did it. So each takes back its own and nobody else's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from threading import RLock
from types import ModuleType
from typing import Any, Final

import torch

Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]

_ROTARY: Final = "apply_rotary_pos_emb"

exchanging = RLock()
"""Held by whoever finds out whether something is exchanged and acts on it."""

_rotaries: dict[ModuleType, list[Rotary]] = {}
"""Files whose rotary embedding is exchanged at the moment: what it was before, and what is in its place."""


def exchange_forward(module: torch.nn.Module, forward: Callable[..., Any], stack: ExitStack) -> bool:
    """Exchange what a module does until the stack ends; False if something is in its place already."""
    with exchanging:
        if "forward" in vars(module):
            return False
        module.forward = forward
    stack.callback(delattr, module, "forward")
    return True


def rotary_of(file: ModuleType) -> Rotary | None:
    """A file's own rotary embedding, if it has one, whatever is in its place at the moment."""
    with exchanging:
        return _rotaries[file][0] if file in _rotaries else getattr(file, _ROTARY, None)


def exchange_rotary(file: ModuleType, wrap: Callable[[Rotary], Rotary], stack: ExitStack) -> None:
    """Exchange the rotary embedding of a file until the stack ends; `wrap` makes the new one of the file's own."""
    with exchanging:
        known = _rotaries.setdefault(file, [getattr(file, _ROTARY)])
        ours = wrap(known[0])
        known.append(ours)
        setattr(file, _ROTARY, ours)
    stack.callback(_take_back, file, ours)


def _take_back(file: ModuleType, ours: Rotary) -> None:
    with exchanging:
        known = _rotaries[file]
        known.remove(ours)
        setattr(file, _ROTARY, known[-1])
        if len(known) == 1:
            del _rotaries[file]
