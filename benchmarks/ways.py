"""Ways of generating with a KV cache, which generate.py and memory.py compare: ours, transformers' and PyPI's.

Every way takes a model, a prompt `[1, length]`, a number of new tokens and `read`, which is called with each token as
soon as the host knows it; it chooses greedily, and says how it decoded. Packages beyond transformers are optional: a
way whose package is missing raises `PackageNotFoundError`. The peers are given 4 bits, and everything else as their
own documentation has it. All three name their module `turboquant`, so only one of them can be installed at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from turboquant_local import TurboQuantCache
from turboquant_local.engine.decode_loop import DecodeLoop, Read
from turboquant_local.engine.prefill import prefill
from turboquant_local.engine.sampling import Sampling
from turboquant_local.evaluation.codecs.quantized_cache import TransformersQuantizedCache

Way = Callable[[LlamaForCausalLM, torch.Tensor, int, Read], str]


class _Reader(StoppingCriteria):
    """Hands each token of `generate` on. `generate` waits for the device after each token anyway."""

    def __init__(self, read: Read) -> None:
        self._read = read

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._read(int(input_ids[0, -1]))
        return torch.zeros(1, dtype=torch.bool, device=input_ids.device)


def llama(layers: int) -> LlamaForCausalLM:
    """Llama-3.1-8B's geometry with random weights in bfloat16, made on the device itself."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072,
        tie_word_embeddings=False, rms_norm_eps=1e-5, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model


def by_generate(model: LlamaForCausalLM, prompt: torch.Tensor, tokens: int, read: Read, **kwargs: Any) -> str:
    """Transformers' `generate`."""
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
        stopping_criteria=StoppingCriteriaList([_Reader(read)]), **kwargs,
    )  # fmt: skip
    return "eager"


def with_cache(make: Callable[[LlamaForCausalLM], Any], package: str = "") -> Way:
    """`generate` with a cache of its own, which comes from a package."""

    def way(model: LlamaForCausalLM, prompt: torch.Tensor, tokens: int, read: Read) -> str:
        model.set_attn_implementation("sdpa")
        named = f", {package} {version(package)}" if package else ""  # first: it says so if there is none
        return by_generate(model, prompt, tokens, read, past_key_values=make(model)) + named

    return way


def chunked(model: LlamaForCausalLM, prompt: torch.Tensor, tokens: int, read: Read) -> str:
    """Transformers' default with a prompt in pieces, which saves the most memory."""
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    return by_generate(model, prompt, tokens, read, past_key_values=cache, prefill_chunk_size=2048)


def grouped_cudnn(
    module: torch.nn.Module, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """SDPA as transformers calls it for a prompt; for one token, by cuDNN without a copy of the keys for each head.

    The cache of fixed length needs a mask, with which transformers copies keys and values for every query head.
    """
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, k, v, mask, **kwargs)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = scaled_dot_product_attention(query, k, v, mask, scale=kwargs["scaling"], enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("grouped_cudnn", grouped_cudnn)
AttentionMaskInterface.register("grouped_cudnn", sdpa_mask)


def static_compiled(attention: str) -> Way:
    """A cache of fixed length; `generate` itself compiles the steps after the prompt, with CUDA graphs."""

    def way(model: LlamaForCausalLM, prompt: torch.Tensor, tokens: int, read: Read) -> str:
        model.set_attn_implementation(attention)
        by_generate(model, prompt, tokens, read, cache_implementation="static")
        return "compiled"

    return way


def ours_eager(model: LlamaForCausalLM, prompt: torch.Tensor, tokens: int, read: Read) -> str:
    """The compressed cache under `generate`; as in an engine, what ends up far is run first and alone."""
    cache = TurboQuantCache(model.config)
    if packed := cache.window_start(prompt.shape[1] - 1):
        prefill(model, cache, prompt[:, :packed], packed)
    return by_generate(model, prompt, tokens, read, past_key_values=cache)


def ours(preset: str) -> Way:
    """What an engine does on a CUDA device."""

    def way(model: LlamaForCausalLM, prompt: torch.Tensor, tokens: int, read: Read) -> str:
        sampling = Sampling(GenerationConfig(max_new_tokens=tokens), LogitsProcessorList(), frozenset(), ())
        return DecodeLoop().run(model, TurboQuantCache(model.config, preset), prompt, sampling, read)

    return way


def _quantized(backend: Any) -> Callable[[LlamaForCausalLM], Any]:
    return lambda model: TransformersQuantizedCache(backend, backend, 4).cache(model.config)


def _peer(model: LlamaForCausalLM) -> Any:
    from turboquant import TurboQuantCache as Peer

    if not hasattr(numpy, "trapz"):
        numpy.trapz = numpy.trapezoid  # numpy 2.4 took the name away, without which it fails
    return Peer(bits=4)


def _peer_kv(model: LlamaForCausalLM) -> Any:
    from turboquant import TurboQuantModel

    return TurboQuantModel(model, bits=4, device=str(model.device), dtype=model.dtype).make_dynamic_cache()


def _peer_torch(model: LlamaForCausalLM) -> Any:
    from turboquant import TurboQuantDynamicCache

    return TurboQuantDynamicCache.from_model(model, bit_width=4)


WAYS: dict[str, Way] = {
    "DynamicCache": with_cache(lambda model: DynamicCache(config=model.config)),
    "DynamicCache, prompt in chunks": chunked,
    "ours balanced": ours("balanced"),
    "ours compact": ours("compact"),
    "ours extreme": ours("extreme"),
    "ours eager": ours_eager,
    "StaticCache compiled": static_compiled("sdpa"),
    "StaticCache compiled, FlexAttention": static_compiled("flex_attention"),
    "StaticCache compiled, grouped cuDNN": static_compiled("grouped_cudnn"),
    "QuantizedCache quanto": with_cache(_quantized("quanto"), "optimum-quanto"),
    "QuantizedCache hqq": with_cache(_quantized("hqq"), "hqq"),
    "PyPI turboquant": with_cache(_peer, "turboquant"),
    "PyPI turboquant-kv": with_cache(_peer_kv, "turboquant-kv"),
    "PyPI turboquant-torch": with_cache(_peer_torch, "turboquant-torch"),
}
