"""Models to be measured, the text that is always there, and what figures depend on."""

import pytest
import torch

from turboquant_local.errors import ModelLoadError
from turboquant_local.evaluation.default_text import default_text
from turboquant_local.evaluation.environment import environment
from turboquant_local.evaluation.models import letter_tokenizer, load_model
from turboquant_local.testing import VOCAB_SIZE


def test_tiny_random_models_have_names() -> None:
    loaded = load_model("testing:qwen3", device="cpu", dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.context_length == 16_384
    with pytest.raises(ModelLoadError, match="expected testing: and one of llama, "):
        load_model("testing:gpt5")
    with pytest.raises(ModelLoadError, match="no such folder"):
        load_model("./nowhere")


def test_letters_become_tokens_and_come_back() -> None:
    tokenizer = letter_tokenizer()
    ids = tokenizer("Ab 1\n").input_ids
    assert len(ids) == 5
    assert max(tokenizer("~ \x7f é 😀").input_ids) < VOCAB_SIZE
    assert tokenizer.decode(ids) == "Ab 1\n"


def test_python_brings_enough_text() -> None:
    assert len(default_text()) > 300_000
    assert default_text() == default_text()


def test_conditions_name_machine_and_versions() -> None:
    found = environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert list(found) == ["date", "machine", "processor", "python", "torch", "transformers", "turboquant_local"]
    assert all(found.values())
