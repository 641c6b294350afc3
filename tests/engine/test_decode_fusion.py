"""A model with exchanged operations computes the same, and is itself again afterwards."""

import importlib.util

import pytest
import torch
from transformers.models.llama import modeling_llama

from turboquant_local.engine.decode_fusion import fused
from turboquant_local.testing import random_tokens, tiny_model

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    # Norms of two a layer and one at the end; in Qwen3 of queries and keys too. Gemma's adds one to the weight and has
    # another name for its epsilon.
    ("name", "count"),
    [("llama", 10), ("qwen2", 10), ("qwen3", 18), ("phi3", 10), ("gemma3", 1)],
)
@torch.no_grad()
def test_the_same_scores(name: str, count: int) -> None:
    model, ids, longer = tiny_model(name).to(DEVICE), random_tokens(1, 1).to(DEVICE), random_tokens(1, 5).to(DEVICE)
    position = torch.tensor([[7]], device=DEVICE)
    expected = model(ids, position_ids=position).logits
    with fused(model) as exchanged:
        out = model(ids, position_ids=position).logits
        more = model(longer).logits
    assert exchanged == count
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(ids, position_ids=position).logits, expected)
    torch.testing.assert_close(more, model(longer).logits, rtol=1e-4, atol=1e-4)


def test_other_operations_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").to(DEVICE)
    model.model.norm.forward = lambda x: x
    original = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: original(q, k, sin, cos))
    other = modeling_llama.apply_rotary_pos_emb
    with fused(model) as exchanged:
        assert modeling_llama.apply_rotary_pos_emb is other
    assert exchanged == 8
