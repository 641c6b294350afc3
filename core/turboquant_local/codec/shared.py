"""Tensors that are made once a process."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., object])


def shared(function: Function) -> Function:
    """Remember what a function of hashable arguments returns.

    Whoever calls it first may be in `torch.inference_mode()`, whose tensors nobody could use in autograd later, or have
    another default device than those who come after: what is made is independent of both.
    """

    @lru_cache(maxsize=64)
    @wraps(function)
    def made(*args: object, **kwargs: object) -> object:
        with torch.inference_mode(False), torch.device("cpu"):
            return function(*args, **kwargs)

    return made  # type: ignore[return-value]
