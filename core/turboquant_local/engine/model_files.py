"""What a model's folder must hold, and what to say when a model cannot be loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from turboquant_local.errors import ModelLoadError

_WEIGHTS: Final = ("*.safetensors", "pytorch_model*.bin")
_INDEXES: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_TOKENIZERS: Final = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("tekken.json",),
    # A tokenizer in the model's own code may bring files of any name.
    ("tokenizer_config.json", "*.tiktoken"),
    ("tokenizer_config.json", "tokenization_*.py"),
)

_NO_NETWORK: Final = frozenset(
    {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError", "TimeoutException"}
)
"""Names of errors (our dependencies' and theirs) that mean: the hub was out of reach."""


def resolve_model(model: str) -> str:
    """The absolute path of a local folder; a name on the hub as it is."""
    folder = os.path.abspath(os.path.expanduser(model))
    return folder if os.path.isdir(folder) else model


def check_model_files(model: str, *, model_kwargs: Mapping[str, Any]) -> None:
    """Look into a local folder before anything is loaded; names on the hub pass.

    Raises:
        ModelLoadError: The folder does not exist or lacks files; the message lists them.
    """
    folder = Path(os.path.expanduser(model))
    if folder.is_file():
        raise ModelLoadError(f"model={model!r}: this is a file; give the folder that holds it")
    if not folder.is_dir():
        if _looks_like_path(model):
            raise ModelLoadError(
                f"model={model!r}: no such folder ({folder.absolute()}); give an existing folder or a name on the "
                "Hugging Face hub such as 'Qwen/Qwen3-0.6B'"
            )
        return
    if "gguf_file" in model_kwargs:
        return
    if missing := _missing_files(folder):
        raise ModelLoadError(
            f"model={model!r}: the folder lacks {'; '.join(missing)}. Copy what is missing into "
            f"{folder.absolute()}, or save again with model.save_pretrained and tokenizer.save_pretrained"
        )


def explain_load_error(model: str, error: Exception) -> str:
    """One sentence on why `from_pretrained` failed, and the way out."""
    reasons = [error]
    while isinstance(inner := reasons[-1].__cause__ or reasons[-1].__context__, Exception) and inner not in reasons:
        reasons.append(inner)
    names = {kind.__name__ for reason in reasons for kind in type(reason).__mro__}
    if isinstance(error, torch.OutOfMemoryError):
        advice = "the model does not fit on the device; use a smaller one, dtype='bfloat16' or device='cpu'"
    elif "GatedRepoError" in names:
        advice = "the model is gated; accept its licence on its page and give a token"
    elif "RepositoryNotFoundError" in names:
        advice = "no such model on the hub, or a private one; check the name, or give a token"
    elif "RevisionNotFoundError" in names:
        advice = "the model has no such revision; check revision"
    elif names & _NO_NETWORK:
        advice = "the hub cannot be reached and the model is not in its local cache; go online, or give a local folder"
    elif isinstance(error, ImportError):
        advice = "a package that the model needs is not installed"
    else:
        advice = "it could not be loaded"
    return f"model={model!r}: {advice} ({type(error).__name__}: {_first_line(error)})"


def _missing_files(folder: Path) -> list[str]:
    missing = []
    if not (folder / "config.json").is_file():
        missing.append("config.json (the model's configuration)")
    indexes = [folder / name for name in _INDEXES if (folder / name).is_file()]
    shards = {name for index in indexes for name in _shards(index)}
    lost = sorted(name for name in shards if not (folder / name).is_file())
    if indexes:
        missing.extend(f"{name} (weights)" for name in lost)
    elif not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        missing.append("weights (model.safetensors)")
    if not any(all(any(folder.glob(name)) for name in names) for names in _TOKENIZERS):
        missing.append("tokenizer files (tokenizer.json, or tokenizer.model)")
    return missing


def _shards(index: Path) -> list[str]:
    try:
        return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index}: not a readable index of weights; copy it again") from error


def _looks_like_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or "\\" in model or model.count("/") > 1


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no further detail")
