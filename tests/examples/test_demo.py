"""The demo finds both answers and fails loudly when it does not."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples/demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)
    spec.loader.exec_module(module)
    return module


def test_it_runs_from_anywhere(tmp_path: Path) -> None:
    environment = os.environ | {"COLUMNS": "120", "HF_HUB_OFFLINE": "1", "HAYSTACK_TELEMETRY_ENABLED": "False"}
    command = [sys.executable, str(ROOT / "examples/demo.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for wanted in (
        "The capital of France is Paris.",
        "The pass key is",
        "time to first token",
        "vram_bytes()",
        "ratio",
    ):
        assert wanted in done.stdout


def reply(text: str, ratio: float) -> SimpleNamespace:
    return SimpleNamespace(text=text, meta={"turboquant": {"compression_ratio": ratio}})


@pytest.mark.parametrize(
    ("text", "ratio", "complaint"),
    [("The pass key is 4.", 3.5, None), ("The pass key is 5.", 3.5, "'4'"), ("The pass key is 4.", 3.3, "3.30")],
)
def test_a_wrong_answer_or_a_low_ratio_is_a_fault(
    demo: ModuleType, text: str, ratio: float, complaint: str | None
) -> None:
    asked = [demo.Question("key", "key?", "key?", "4")]
    faults = demo.faults(asked, [reply(text, ratio)], [reply("It is 4.", 1.0)])
    assert [complaint in fault for fault in faults] == ([] if complaint is None else [True])


def test_agreement_counts_tokens_from_the_start(demo: ModuleType) -> None:
    tokenizer = demo.Tokenizer.from_file(str(demo.MODEL / "tokenizer.json"))
    one, two = (SimpleNamespace(text=text, meta={"finish_reason": "stop"}) for text in ("It is Paris.", "It is Rome."))
    tokens = len(tokenizer.encode(one.text).ids)
    assert demo.agreement(one, one, tokenizer) == (tokens + 1, tokens + 1)
    same, _ = demo.agreement(one, two, tokenizer)
    assert 0 < same < tokens
