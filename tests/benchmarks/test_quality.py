"""The quality table from one command: every column filled, every target judged, every row written."""

import csv
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/quality.py"


def test_one_command_prints_and_writes_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codecs = ["identity", "compact", "ours-2", "kivi-2"]
    words = ["--window", "500", "--context", "300", "--windows", "2", "--codecs", *codecs]
    words += [
        "--task-codecs",
        "compact",
        "--samples",
        "1",
        "--lengths",
        "400",
        "--depths",
        "0.5",
        "--tool-samples",
        "1",
    ]
    words += ["--out", str(tmp_path / "quality.csv"), "--plot", str(tmp_path / "quality.png")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert "2 windows of 500 tokens, 398 scored" in printed
    for target in ("compact: compression at 4096", "compact: mean KL", "compact: perplexity", "compact: retrieval"):
        assert f" {target}" in printed
    assert "kivi-2: kl_tail over ours at its bytes" in printed
    read = {row["codec"]: row for row in csv.DictReader((tmp_path / "quality.csv").read_text().splitlines())}
    assert list(read) == codecs
    assert float(read["identity"]["kl_mean"]) < 1e-6 < float(read["compact"]["kl_mean"])
    assert read["compact"]["retrieval"]
    assert read["compact"]["tools_valid"]
    cells = list(csv.DictReader((tmp_path / "quality_retrieval.csv").read_text().splitlines()))
    assert {row["codec"] for row in cells} == {"uncompressed", "compact"}
    assert len(cells) == 2 * 3
    assert (tmp_path / "quality.png").exists()
