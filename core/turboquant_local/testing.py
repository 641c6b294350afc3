"""Tiny models of real architectures and byte counters, for our tests and for those of users.

`tiny_model` needs no download; `reachable_bytes` counts what an object keeps alive; `PeakBytes` counts what a piece
of code held at its highest moment.
"""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import _lru_cache_wrapper, partial
from typing import Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE: Final = 128
"""Tokens a tiny model knows; ids 0 (padding), 1 and 2 are left out of `random_tokens`."""

SLIDING_WINDOW: Final = 24
"""Window of the sliding layers of tiny models, in tokens."""

_COMMON: Final[Mapping[str, object]] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16_384,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

_MOE: Final[Mapping[str, object]] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}

_MODELS: Final[Mapping[str, tuple[str, Mapping[str, object]]]] = {
    "llama": ("llama", {"head_dim": 64}),
    # Biases on queries and keys; a head size with no Hadamard matrix of 2^k or 3*2^k.
    "qwen2": ("qwen2", {"head_dim": 80}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    # Every layer is a sliding one.
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": SLIDING_WINDOW}),
    # Softcapped scores, scaled by other than the head size; sliding and full layers take turns.
    "gemma2": (
        "gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 20, "sliding_window": SLIDING_WINDOW, "attn_logit_softcapping": 10.0},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 48,
            "query_pre_attn_scalar": 30,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    # One fused projection for queries, keys and values; a head size of 3*2^k.
    "phi3": ("phi3", {"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}),
    # Attention sinks; sliding and full layers take turns.
    "gpt-oss": ("gpt_oss", {"head_dim": 32, "sliding_window": SLIDING_WINDOW, "num_local_experts": 4, **_MOE}),
    "qwen3-moe": ("qwen3_moe", {"head_dim": 32, "num_experts": 4, **_MOE}),
    # Two of three layers keep a recurrent state instead of keys and values.
    "qwen3.5": (
        "qwen3_5_text",
        {
            "head_dim": 32,
            "num_hidden_layers": 6,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    # Every layer has a recurrent state and full attention.
    "falcon-h1": (
        "falcon_h1",
        {
            "head_dim": 32,
            "num_hidden_layers": 3,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
        },
    ),
    # Latent attention (MLA): keys and values of different sizes.
    "deepseek-v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 2,
            **_MOE,
        },
    ),
}

TINY_MODELS: Final[tuple[str, ...]] = tuple(_MODELS)
"""Names that `tiny_model` knows."""

# Gains over 1/sqrt(fan_in). Sharp attention and an unnormalised vocabulary make greedy text that wanders and
# that depends on far tokens; transformers' own initialisation repeats one token for ever.
_GAINS: Final = (
    (("q_proj", "k_proj", "q_b_proj", "kv_a_proj", "qkv_proj"), 2.0),
    (("lm_head",), 3.0),
)


def tiny_model(name: str, *, seed: int = 0, **config: object) -> PreTrainedModel:
    """Build a small random model of a real architecture: float32, on the CPU, in evaluation mode.

    The same arguments give the same weights, and leave the process-wide random state untouched.

    Args:
        name: One of `TINY_MODELS`.
        seed: Seed of the weights.
        config: Fields of the model's config that replace ours.

    Raises:
        ValueError: An unknown name.
    """
    if name not in _MODELS:
        raise ValueError(f"name={name!r}: expected one of {', '.join(_MODELS)}")
    model_type, fields = _MODELS[name]
    model_config = AutoConfig.for_model(model_type, **{**_COMMON, **fields, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
        _scale_weights(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.eval()
    return model


@torch.no_grad()
def _scale_weights(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if module in ("q_norm", "k_norm"):
            parameter.add_(1.0)
        elif name.endswith("_proj.bias"):
            parameter.normal_(std=0.3)
        elif module == "sinks":
            parameter.normal_(mean=4.0, std=4.0)  # Scores of sharp attention: some heads mostly look away.
        elif "embed" in name:
            parameter.normal_(std=1.0 / getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0))
        elif parameter.ndim >= 2:
            gain = next((gain for modules, gain in _GAINS if module.startswith(modules)), 1.0)
            parameter.normal_(std=gain / parameter.shape[-1] ** 0.5)


def random_tokens(batch_size: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Token ids for a tiny model, [batch_size, length], without its special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch_size, length), generator=generator)


def random_kv(
    config: PreTrainedConfig, batch_size: int, length: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal keys and values for one layer, each [batch_size, num_kv_heads, length, head_dim].

    With `cache.update(*random_kv(...), layer)` a long cache is filled without running a model.
    """
    generator = torch.Generator().manual_seed(seed)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch_size, config.num_key_value_heads, length, head_dim)
    return torch.randn(shape, generator=generator).to(dtype), torch.randn(shape, generator=generator).to(dtype)


def reachable_bytes(*roots: object) -> int:
    """Bytes of all tensor storages that objects keep alive, each storage counted once and in full.

    The walk follows everything the garbage collector can follow, except modules, types, functions and frames. A
    tensor without memory of its own (a wrapper subclass, or one on the meta device) adds nothing.

    Args:
        roots: Where the walk begins.
    """
    return sum(storage.nbytes() for storage in _reachable_storages(roots))


_NOT_ENTERED: Final = (
    types.ModuleType,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.FrameType,
    types.CodeType,
    _lru_cache_wrapper,
)


def _reachable_storages(roots: Sequence[object]) -> list[torch.UntypedStorage]:
    storages: dict[int, torch.UntypedStorage] = {}
    seen: dict[int, object] = {}
    stack: list[object] = list(roots)
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, _NOT_ENTERED):
            continue
        seen[id(item)] = item  # Kept, so that no id is used twice during the walk.
        if (storage := _storage(item)) is not None:
            storages[storage._cdata] = storage
        stack.extend(gc.get_referents(item))
    return list(storages.values())


def _storage(item: object) -> torch.UntypedStorage | None:
    if isinstance(item, torch.UntypedStorage):
        return item
    if not isinstance(item, torch.Tensor) or item.is_meta or item.layout is not torch.strided:
        return None
    with torch._C.DisableTorchFunctionSubclass():  # A subclass must not act because it is counted.
        storage = item.untyped_storage()
    try:
        storage.data_ptr()
    except RuntimeError:  # A wrapper subclass: its storage is only a size.
        return None
    return storage


class PeakBytes(TorchDispatchMode):
    """Counts the tensor bytes alive while it is active, by storage, on any device.

    Counted are the storages that operations inside create (views add nothing) and, from the start, those reachable
    from `held`. Memory that a kernel takes and gives back within one operation is not seen.

    Example::

        with PeakBytes(cache) as counted:
            model(token, past_key_values=cache)
        assert counted.peak < 1.3 * cache.vram_bytes()

    Attributes:
        live: Bytes alive now.
        peak: The most bytes alive at once so far.
    """

    def __init__(self, *held: object) -> None:
        """Start from the storages reachable from `held`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watches: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for storage in _reachable_storages(held):
            self._watch(storage)

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run one operation and count what it made."""
        given = {s._cdata for leaf in tree_leaves((args, kwargs)) if (s := _storage(leaf)) is not None}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            storage = _storage(leaf)
            if storage is not None and (storage._cdata in self._sizes or storage._cdata not in given):
                self._watch(storage)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            # torch keeps one Python object per storage for as long as the storage lives, so its death is the memory's.
            self._watches[key] = weakref.ref(storage, partial(self._forget, key))
        self.live += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, _: object) -> None:
        self.live -= self._sizes.pop(key)
        del self._watches[key]
