"""A model with exchanged operations computes the same, and is itself again afterwards."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.models.llama import modeling_llama

from turboquant_local.engine import decode_fusion
from turboquant_local.engine.decode_fusion import fused
from turboquant_local.testing import random_tokens, tiny_model

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    # Of a layer: two norms (in Qwen3 of queries and keys too; Gemma's adds one to the weight and has another name for
    # its epsilon), projections (Phi's are one), their output, the two halves of the MLP. Of a model: the last norm, the
    # rotation and the head.
    ("name", "count"),
    [("llama", 31), ("qwen2", 31), ("qwen3", 39), ("phi3", 27), ("gemma3", 18)],
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
    assert exchanged == 29


@torch.no_grad()
def test_layers_that_are_more_than_a_product_are_left_alone() -> None:
    class Adapted(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    class Packed(torch.Tensor):
        pass

    model, ids, seen = tiny_model("llama").to(DEVICE), random_tokens(1, 1).to(DEVICE), []
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    first.q_proj.register_forward_hook(lambda *_: seen.append("hook"))
    first.k_proj.__class__ = Adapted
    second.v_proj.bias = torch.nn.Parameter(torch.ones_like(second.v_proj.weight[:, 0]))
    model.model.layers[2].mlp.act_fn = torch.nn.ReLU()
    last = model.model.layers[3].self_attn.o_proj
    last.weight = torch.nn.Parameter(last.weight.data.as_subclass(Packed))
    expected = model(ids).logits
    with fused(model) as exchanged:
        out = model(ids).logits
    # Of the first layer v alone is a product; the second layer's three do not go together; gate and up of the third
    # are two products; the last one's output has a weight of another class.
    assert exchanged == 29
    assert len(seen) == 2
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_another_thread_computes_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while it is found out what can be exchanged."""
    model, ids = tiny_model("llama").to(DEVICE), random_tokens(1, 9).to(DEVICE)
    expected, near, outs = model(ids).logits, decode_fusion.near, []
    with ThreadPoolExecutor(1) as pool:

        def compared(a: torch.Tensor, b: torch.Tensor) -> bool:
            outs.append(pool.submit(torch.no_grad()(lambda: model(ids).logits)).result())
            return near(a, b)

        monkeypatch.setattr(decode_fusion, "near", compared)
        with fused(model):
            pass
    assert len(outs) >= 8
    for out in outs:
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_layers_with_other_arguments_and_results_are_left_alone() -> None:
    """As in a model's own code: a layer that returns a tuple, a network that takes more than hidden states."""
    model = tiny_model("llama").to(DEVICE)
    whole = type(model.model.layers[0])

    class Pair(whole):
        def forward(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, None]:
            return super().forward(*args, **kwargs), None

    for layer in model.model.layers:
        layer.__class__ = Pair
    network = type(model.model.layers[0].mlp)

    class Scaled(network):
        def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
            return super().forward(x) * scale

    model.model.layers[1].mlp.__class__ = Scaled
    with fused(model) as exchanged:
        assert all("forward" not in vars(layer) for layer in model.model.layers)
        assert "forward" not in vars(model.model.layers[1].mlp)
    # The four sums are left, and two networks become a gate and an up product less than one.
    assert exchanged == 31 - 4 + 1
