"""A model passes or fails, and the layer at fault is named."""

import json

import pytest
import torch

from turboquant_local import TurboQuantConfig
from turboquant_local.evaluation.verification import COSINE_MARGIN, Thresholds, Verification, expected_cosine, verify
from turboquant_local.testing import random_tokens, tiny_model

LOOSE = Thresholds(kl=10.0, top1=0.0)


def run(name: str, thresholds: Thresholds = LOOSE, **fields: object) -> Verification:
    kv_cache = TurboQuantConfig.parse(None, **fields)
    return verify(tiny_model(name), random_tokens(2, 260), kv_cache, thresholds, context=100)


def failed(found: Verification) -> list[str]:
    return [check.figure for check in found.checks if not check.passed]


def test_a_random_rotation_earns_the_expected_cosine_in_every_layer() -> None:
    for bits in (2, 3, 4, 8):
        found = run("qwen3", k_bits=bits, v_bits=bits, near_length=0)
        assert found.passed, found.checks
        cosines = [layer.value_cosine or 0 for layer in found.layers]
        expected = expected_cosine(tiny_model("qwen3").config, bits) + COSINE_MARGIN
        assert sum(cosines) / len(cosines) == pytest.approx(expected, abs=0.005 if bits > 2 else 0.01)


def test_a_cosine_threshold_names_the_worst_layer() -> None:
    found = run("llama", Thresholds(cosine=0.99, kl=10.0, top1=0.0), k_bits=4, v_bits=3, near_length=0)
    assert failed(found) == ["value_cosine"]
    (check,) = (check for check in found.checks if not check.passed)
    worst = min(found.layers, key=lambda layer: layer.value_cosine or 1)
    assert (check.layer, check.value, check.threshold) == (worst.layer, worst.value_cosine, 0.99)
    assert not found.passed


def test_predictions_are_checked_and_the_loudest_layer_is_named() -> None:
    found = run("llama", Thresholds(kl=0.001, top1=0.9999), preset="extreme")
    assert failed(found) == ["kl_mean", "top1_agreement"]
    loudest = max(found.layers, key=lambda layer: layer.output_error or 0)
    assert {check.layer for check in found.checks if not check.passed} == {loudest.layer}


def test_layers_of_few_bits_are_held_to_what_these_promise() -> None:
    found = run("llama", layer_bits={1: (2, 3)}, near_length=0)
    assert found.passed, found.checks
    cosines = [layer.key_cosine or 0 for layer in found.layers]
    assert cosines[1] < 0.95 < 0.99 < cosines[0]


def test_auto_becomes_what_suits_the_model() -> None:
    assert run("qwen2", preset="auto").kv_cache == TurboQuantConfig(preset="turboquant_k8v4")
    assert run("llama", preset="auto", v_bits=3).kv_cache == TurboQuantConfig(v_bits=3)


def test_a_damaged_layer_is_found() -> None:
    """Queries of one layer a hundred times too sharp: its attention follows every error of a key."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight.mul_(100)
    found = verify(model, random_tokens(1, 260), TurboQuantConfig(), Thresholds(), context=100)
    assert {check.layer for check in found.checks if not check.passed} == {2}


def test_the_floor_is_rounding_alone() -> None:
    found = run("llama")
    assert found.floor.kl_mean < 1e-6 < found.fidelity.kl_mean


def test_nothing_compressed_is_no_failure() -> None:
    found = run("mistral", Thresholds())
    assert found.passed
    assert [check.figure for check in found.checks] == ["kl_mean", "top1_agreement"]
    assert found.stored_bytes == found.uncompressed_bytes


def test_bytes_that_do_not_follow_from_the_config_are_left_out() -> None:
    assert run("qwen3.5").stored_bytes is None


def test_it_becomes_json() -> None:
    found = run("llama")
    read = json.loads(json.dumps(found.to_dict()))
    assert read["passed"] is True
    assert read["kv_cache"]["k_bits"] == 4
    assert read["layers"][3]["layer"] == 3
    assert read["checks"][0] == {
        "figure": "key_cosine",
        "value": found.checks[0].value,
        "threshold": found.checks[0].threshold,
        "passed": True,
        "layer": found.checks[0].layer,
    }


def test_progress_is_told_as_promised() -> None:
    told: list[str] = []
    verify(tiny_model("llama"), random_tokens(2, 200), TurboQuantConfig(), LOOSE, context=50, on_progress=told.append)
    assert told == ["balanced", "identity"] * 2 + ["layers"]
