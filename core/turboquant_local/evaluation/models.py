"""The model to be measured: a folder, a name on the hub, or a tiny random one."""

from __future__ import annotations

from typing import Final

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from turboquant_local.engine.loading import LoadedModel, ModelSpec, acquire_model, check_device, default_device
from turboquant_local.errors import ModelLoadError
from turboquant_local.testing import TINY_MODELS, VOCAB_SIZE, tiny_model

TESTING: Final = "testing:"
"""Prefix of the names of tiny random models, as in "testing:llama"."""


def load_model(model: str, *, device: str | None = None, dtype: str | None = None) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        model: A folder, a name on the Hugging Face hub, or "testing:" and one of `TINY_MODELS`, a random model that
            needs no download and knows nothing.
        device: A torch device; None takes the best one.
        dtype: "auto" (the default), "float32", "float16" or "bfloat16".

    Raises:
        ModelLoadError: There is no such model, or it cannot be loaded.
        ConfigError: An unknown dtype or device.
        BackendError: The device does not exist here.
    """
    spec = ModelSpec(model=model, device=device, dtype=dtype)
    if not model.startswith(TESTING):
        return acquire_model(spec)
    name = model.removeprefix(TESTING)
    if name not in TINY_MODELS:
        raise ModelLoadError(f"model={model!r}: expected {TESTING} and one of {', '.join(TINY_MODELS)}")
    device = device or default_device()
    check_device(device)
    tiny = tiny_model(name).to(device)  # type: ignore[arg-type]
    if dtype not in (None, "auto"):
        tiny = tiny.to(getattr(torch, dtype))
    return LoadedModel(tiny, letter_tokenizer(), GenerationConfig())


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, for tiny random models: ASCII, and one token for everything else."""
    specials = ["<pad>", "<bos>", "<eos>"]
    letters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: index for index, token in enumerate([*specials, *letters, "<unk>"])}
    assert len(vocabulary) <= VOCAB_SIZE
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
