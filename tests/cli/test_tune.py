"""`tune`: the table, the settings it prints, and what it says about bad input."""

import json
from collections.abc import Callable

import pytest
from click.testing import Result

from turboquant_local import TurboQuantCache, TurboQuantConfig
from turboquant_local.testing import tiny_model

Invoke = Callable[..., Result]


@pytest.fixture
def quick() -> list[str]:
    """Some tokens are older than the near ones."""
    return ["--model", "testing:llama", "--device", "cpu", "--window", "420", "--windows", "2"]


def test_the_settings_can_be_used_as_they_are_printed(invoke: Invoke, quick: list[str]) -> None:
    done = invoke("tune", *quick, "--preset", "compact")
    assert done.exit_code == 0, done.output
    assert "checked on 314 tokens that were not used to divide" in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("kv_cache="))
    kv_cache = TurboQuantConfig.parse(json.loads(line.removeprefix("kv_cache=")))
    assert sum(k_bits + v_bits for _, k_bits, v_bits in kv_cache.layer_bits) <= 4 * 6
    assert TurboQuantCache(tiny_model("llama").config, kv_cache).kv_cache.preset == "compact"


def test_json(invoke: Invoke, quick: list[str]) -> None:
    done = invoke("tune", *quick, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["kv_cache"]["preset"] == "balanced"
    assert found["kl_before"] > 0 < found["kl_after"]


def test_a_model_whose_bytes_are_unknown(invoke: Invoke, quick: list[str]) -> None:
    done = invoke("tune", *quick, "--model", "testing:qwen3.5")
    assert done.exit_code == 0, done.output
    assert "tuned      mean KL" in done.stdout
    assert "\nkv_cache={" in done.stdout


def test_one_window_leaves_nothing_to_check_on(invoke: Invoke, quick: list[str]) -> None:
    done = invoke("tune", *quick[:-1], "1")
    assert done.exit_code == 2
    done = invoke("tune", *quick, "--preset", "uncompressed")
    assert done.exit_code == 2
    assert "no layer of it is compressed" in done.stderr
