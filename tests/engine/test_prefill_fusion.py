"""A model whose operations are exchanged for a prompt computes the same, and is itself again afterwards."""

import importlib.util
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from turboquant_local.engine import prefill_fusion
from turboquant_local.engine.decode_fusion import fused as captured
from turboquant_local.engine.prefill_fusion import fused
from turboquant_local.testing import random_tokens, tiny_model

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    # Norms of two a layer and one at the end, in Qwen3 of queries and keys too; a gated network a layer; the file's
    # rotary embedding. Phi-3 has one projection for both halves of its network, Gemma another activation and norm, and
    # so has Qwen3.5. The norms of recurrent layers take a gate beside the hidden states; Falcon-H1's may do without.
    ("name", "count", "fields"),
    [
        ("llama", 14, {}),
        ("qwen2", 14, {}),
        ("qwen3", 22, {}),
        ("phi3", 10, {}),
        ("gemma3", 1, {}),
        ("qwen3.5", 7, {}),
        ("falcon-h1", 11, {"mamba_rms_norm": True}),
    ],
)
@torch.no_grad()
def test_the_same_scores(name: str, count: int, fields: dict[str, object]) -> None:
    model, ids = tiny_model(name, **fields).to(DEVICE), random_tokens(1, 9).to(DEVICE)
    expected, pair = model(ids).logits, model(ids.repeat(2, 1)).logits
    for _ in range(2):  # what was found is kept
        with fused(model) as exchanged:
            out, both = model(ids).logits, model(ids.repeat(2, 1)).logits
        assert exchanged == count
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(both, pair, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_a_long_prompt_goes_through_gated_networks_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama").to(DEVICE), random_tokens(1, 9).to(DEVICE)
    expected, widths = model(ids).logits, []
    monkeypatch.setattr("turboquant_local.engine.prefill_fusion._AT_ONCE", 4)
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: widths.append(args[2].shape[1]))
    with fused(model):
        widths.clear()
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert widths == [4, 4, 1]


@torch.no_grad()
def test_what_changes_in_a_model_is_seen() -> None:
    """An adapter takes a layer's place, a norm gets another weight, after the first prompt."""
    model, ids = tiny_model("llama").to(DEVICE), random_tokens(1, 9).to(DEVICE)
    with fused(model):
        before = model(ids).logits
    first = model.model.layers[0]
    first.mlp.gate_proj = torch.nn.Sequential(first.mlp.gate_proj, torch.nn.Hardtanh(-0.1, 0.1))
    first.input_layernorm.weight = torch.nn.Parameter(first.input_layernorm.weight * 2)
    expected = model(ids).logits
    with fused(model):
        out = model(ids).logits
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert (out - before).abs().max() > 0.01


def test_other_operations_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").to(DEVICE)
    model.model.norm.forward = lambda x: x
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    original = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: original(q, k, sin, cos))
    other = modeling_llama.apply_rotary_pos_emb
    with fused(model) as exchanged:
        assert modeling_llama.apply_rotary_pos_emb is other
    assert exchanged == 8 + 3
    assert "forward" in vars(model.model.norm)


def test_another_default_device() -> None:
    """Samples are made where they can be read."""
    model = tiny_model("llama").to(DEVICE)
    with torch.device("meta"), fused(model) as exchanged:
        assert exchanged == 14


def test_two_prompts_at_once() -> None:
    """Whichever of them ends first."""
    models, original = [tiny_model("llama").to(DEVICE) for _ in range(2)], modeling_llama.apply_rotary_pos_emb
    for model in models:
        first, second = ExitStack(), ExitStack()
        assert first.enter_context(fused(model)) == 14
        assert second.enter_context(fused(models[0])) == (1 if model is models[0] else 14)
        third = ExitStack()
        third.enter_context(captured(model))  # by another engine
        first.close()
        assert modeling_llama.apply_rotary_pos_emb is not original
        second.close()
        assert modeling_llama.apply_rotary_pos_emb is not original
        third.close()
        assert modeling_llama.apply_rotary_pos_emb is original
        assert all("forward" not in vars(module) for module in model.modules())


def test_what_is_found_while_another_thread_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines share a model that has run no prompt yet."""
    model, other, find = tiny_model("llama").to(DEVICE), ExitStack(), prefill_fusion._exchanges

    def overtaken(*args: Any) -> Any:
        monkeypatch.undo()
        assert other.enter_context(fused(model)) == 14
        return find(*args)

    monkeypatch.setattr(prefill_fusion, "_exchanges", overtaken)
    with fused(model):
        pass
    other.close()
    with fused(model) as exchanged:
        assert exchanged == 14
