"""`KVHandle`: what the cache returns in place of decompressed keys or values."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_map

from turboquant_local.cache.storage import dequantize
from turboquant_local.kernels.layout import KVView

logger = logging.getLogger(__name__)


@dataclass
class AttentionStats:
    """Which attention ran on a cache, and what packed its tokens.

    Attributes:
        attention: Calls by path: "exact" (nothing was packed yet: the model's plain attention) or the name of
            the implementation that read packed tokens.
        packing: Calls by the implementation that packed tokens: "triton", or "reference", which is plain torch.
        materialized: How often keys or values were decompressed as a whole because something other than the
            packed attention touched them.
    """

    attention: Counter[str] = field(default_factory=Counter)
    packing: Counter[str] = field(default_factory=Counter)
    materialized: int = 0

    def reset(self) -> None:
        """Start counting anew."""
        self.attention.clear()
        self.packing.clear()
        self.materialized = 0


class KVHandle(torch.Tensor):
    """A tensor of keys or values by shape, dtype and device, without storage.

    The registered attention reads `view_of_tokens`. Any other operation decompresses first, so that it is right, and is
    counted. A handle is a snapshot: later changes of the cache do not reach it.
    """

    view_of_tokens: KVView
    stats: AttentionStats

    @staticmethod
    def __new__(cls: type[KVHandle], view: KVView, stats: AttentionStats, length: int | None = None) -> KVHandle:
        """Wrap the tokens of one layer: `length` in use, or all there is room for; decompressions count in `stats`."""
        batch, heads, room, head_dim = view.shape
        shape = (batch, heads, room if length is None else length, head_dim)
        handle: KVHandle = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=view.recent.dtype, device=view.recent.device
        )
        handle.view_of_tokens = view
        handle.stats = stats
        return handle

    def dequantize(self) -> torch.Tensor:
        """The keys or values as a plain tensor: `[batch, num_kv_heads, tokens, head_dim]`."""
        return dequantize(self.view_of_tokens)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape and dtype; never the contents."""
        return f"KVHandle(shape={tuple(self.shape)}, dtype={self.view_of_tokens.recent.dtype})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer questions about shape and device; decompress for everything else."""
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*tree_map(_materialize, args), **tree_map(_materialize, kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """For calls that come from C++ and skip `__torch_function__`."""
        return func(*tree_map(_materialize, args), **tree_map(_materialize, kwargs or {}))


def _materialize(x: object) -> object:
    if not isinstance(x, KVHandle):
        return x
    if x.stats.materialized == 0:
        logger.warning(
            "Something other than the packed attention reads the keys or values of a compressed layer: they are "
            "decompressed as a whole, which costs memory and time. If the model uses transformers' attention "
            "interface, call model.set_attn_implementation('turboquant')."
        )
    x.stats.materialized += 1
    return x.dequantize()


_DESCRIPTIONS = frozenset(
    {
        getattr(torch.Tensor, name).__get__
        for name in (
            "shape",
            "dtype",
            "device",
            "ndim",
            "layout",
            "requires_grad",
            "is_leaf",
            "grad_fn",
            "grad",
            "is_cuda",
            "is_cpu",
            "is_meta",
            "is_quantized",
            "is_sparse",
            "is_mps",
            "is_nested",
            "_backward_hooks",
        )
    }
    | {
        getattr(torch.Tensor, name)
        for name in (
            "size",
            "dim",
            "numel",
            "is_floating_point",
            "is_complex",
            "element_size",
            "__len__",
            "__hash__",
            "ndimension",
            "get_device",
            "is_contiguous",
            "stride",
        )
    }
)
