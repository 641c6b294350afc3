"""The packed attention, registered with transformers under the name "turboquant".

Importing the package registers it. It serves the handles that `TurboQuantCache` returns; everything else goes on
to transformers' own attention, so a model keeps working with any other cache.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from turboquant_local.cache.cache import ATTENTION_NAME
from turboquant_local.cache.handle import KVHandle
from turboquant_local.errors import BackendError
from turboquant_local.kernels import api

_UNSUPPORTED = ("position_bias", "indices", "block_indices", "output_attentions")
"""Arguments that change the scores, or ask for them, in ways the packed attention does not know."""


def turboquant_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as transformers calls it.

    Args:
        module: The model's attention module.
        query: `[batch, num_q_heads, q_length, head_dim]`.
        key: A handle, or a plain tensor `[batch, num_kv_heads, kv_length, head_dim]`.
        value: Likewise.
        attention_mask: Bool or float mask `[batch, 1, q_length, kv_length]`, or None for plain causal.
        scaling: Factor of the scores.
        dropout: Only for plain tensors.
        is_causal: Overrides the module's own.
        softcap: Cap of the scores (Gemma 2).
        s_aux: Attention sink logits, one a query head (gpt-oss).
        **kwargs: What else the model passes.

    Returns:
        `[batch, q_length, num_q_heads, v_head_dim]`, and the weights where the model's own attention gave them.

    Raises:
        BackendError: The model asks for something only its own attention can do, and it has none of its own.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = any(kwargs.get(name) is not None and kwargs[name] is not False for name in _UNSUPPORTED) or dropout > 0
    if isinstance(key, KVHandle) and isinstance(value, KVHandle) and not special:
        keys, values = key.view_of_tokens, value.view_of_tokens
        impl = api.choose(query, keys, values)
        out = api.attention(
            query,
            keys,
            values,
            mask=attention_mask,
            causal=causal,
            scaling=scaling,
            softcap=softcap,
            sink_logits=s_aux,
            impl=impl,
        )
        key.stats.attention[impl] += 1
        return out.transpose(1, 2).contiguous(), None
    handled = isinstance(key, KVHandle) or isinstance(value, KVHandle)
    if not handled and softcap is None and s_aux is None:
        if causal and attention_mask is None and 1 < query.shape[2] < key.shape[2]:
            if not special:
                return _behind_others(query, key, value, scaling).transpose(1, 2).contiguous(), None
            # Transformers would align the triangle with the first of the keys.
            shape = (query.shape[2], key.shape[2])
            attention_mask = query.new_ones(shape, dtype=torch.bool).tril(shape[1] - shape[0])[None, None]
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return plain
    return _eager(module, query, key, value, attention_mask, scaling, dropout, causal, softcap, s_aux, kwargs)


def _behind_others(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Causal attention of the last tokens: to all before them, and among themselves."""
    before = key.shape[2] - query.shape[2]
    last_key, last_value = key[:, :, before:], value[:, :, before:]
    choice = torch._fused_sdp_choice(query, last_key, last_value, is_causal=True, scale=scaling, enable_gqa=True)
    if choice != SDPBackend.CUDNN_ATTENTION.value:
        bias = causal_lower_right(query.shape[2], key.shape[2])
        return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling, enable_gqa=True)
    # cuDNN is the fastest where torch chooses it, but aligns the triangle with the first of the keys.
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    far, far_lse = attend(query, key[:, :, :before], value[:, :, :before], None, True, scale=scaling)[:2]
    near, near_lse = attend(query, last_key, last_value, None, True, is_causal=True, scale=scaling)[:2]
    return api.merge(far, far_lse, near, near_lse)


def _eager(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    causal: bool,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention written in the model's own file, with the mask in the form it expects."""
    forward = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if forward is None:
        raise BackendError(
            f"{type(module).__name__}: it asks for {', '.join(_UNSUPPORTED)}, dropout or a softcap, which the packed "
            "attention cannot give, and has no eager attention of its own; use DynamicCache with this model"
        )
    if mask is None and causal and query.shape[2] > 1:
        shape = (query.shape[2], key.shape[2])
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])[None, None]
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    if softcap is not None:
        kwargs = {**kwargs, "softcap": softcap}
    if s_aux is not None:
        kwargs = {**kwargs, "s_aux": s_aux}
    key = key.dequantize() if isinstance(key, KVHandle) else key
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: tuple[torch.Tensor, torch.Tensor | None] = forward(
        module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return out


def turboquant_mask(**kwargs: Any) -> torch.Tensor | None:
    """Transformers' own mask, but none where each token sees all before it: that is as large as queries times keys.

    Transformers makes one for tokens behind others, and, while a CUDA graph is captured, for a single one, of as many
    keys as there are at that moment.

    Args:
        **kwargs: As for `sdpa_mask`.

    Returns:
        Bool `[batch, 1, q_length, kv_length]`, or None for plain causal.
    """
    plain = kwargs.get("allow_is_causal_skip", True) and kwargs.get("local_size") is None
    offset, length = kwargs.get("q_offset", 0), kwargs["q_length"]
    last = length == 1 or (isinstance(offset, int) and offset + length == kwargs["kv_length"])
    if last and kwargs.get("attention_mask") is None and plain:
        return None
    mask: torch.Tensor | None = sdpa_mask(**kwargs)
    return mask


AttentionInterface.register(ATTENTION_NAME, turboquant_attention)
AttentionMaskInterface.register(ATTENTION_NAME, turboquant_mask)
