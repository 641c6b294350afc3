"""What generate.py compares: ways that need nothing run; a missing package is named; new rows take the place of old."""

import csv
import runpy
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def ways() -> dict[str, Any]:
    found: dict[str, Any] = runpy.run_path(str(BENCHMARKS / "ways.py"))["WAYS"]
    return found


def replies(model: LlamaForCausalLM, way: Callable[..., str]) -> list[int]:
    read: list[int] = []
    way(model, torch.arange(50)[None], 6, lambda token: bool(read.append(token)))
    return read


def test_each_token_is_read_once(model: LlamaForCausalLM) -> None:
    known = replies(model, ways()["DynamicCache"])
    assert len(known) == 6
    assert len(replies(model, ways()["ours eager"])) == 6


def test_a_missing_package_is_named(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    for way, package in (("QuantizedCache hqq", "hqq"), ("PyPI turboquant-kv", "turboquant-kv")):
        with pytest.raises(PackageNotFoundError, match=f"No package metadata was found for {package}"):
            replies(model, ways()[way])


def test_rows_with_the_same_key_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    update = runpy.run_path(str(BENCHMARKS / "gpu.py"))["update_rows"]
    path = tmp_path / "rows.csv"
    for way, ms in (("a", 1), ("b", 2), ("a", 3)):
        update(path, [{"way": way, "ms": ms}], ("way",))
    with path.open() as file:
        assert [(row["way"], row["ms"]) for row in csv.DictReader(file)] == [("b", "2"), ("a", "3")]
