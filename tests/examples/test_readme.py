"""The README's Python cells run, in order, and print what stands below them; its figures are rows of the benchmark."""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CELL = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def test_cells_print_what_they_say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    namespace: dict[str, object] = {}
    cells = CELL.findall(README)
    assert len(cells) >= 4
    for source, expected in cells:
        exec(compile(source, "README.md", "exec"), namespace)
        printed = capsys.readouterr().out
        if expected:
            assert printed.split() == expected.split(), source


def rows(text: str) -> dict[tuple[int, str], list[str]]:
    """The lines of the measured table: context and preset to the other cells."""
    lines = re.findall(r"^\| ([\d,]+) \| `?(\w+)`? \| (.*) \|$", text, re.MULTILINE)
    return {(int(context.replace(",", "")), preset): cells.split(" | ") for context, preset, cells in lines}


def test_measured_figures_are_rows_of_the_benchmark() -> None:
    with (ROOT / "benchmarks/results/cpu.csv").open() as file:
        found = list(csv.DictReader(file))
    medians = {(int(row["context"]), row["preset"], row["metric"]): float(row["p50"]) for row in found}
    shown = rows(README)
    assert len(shown) >= 8
    for (context, preset), cells in shown.items():
        stored, ratio, ttft, decode = (medians[context, preset, name] for name in ("stored", "ratio", "ttft", "decode"))
        assert cells == [f"{stored / 2**20:.2f} MiB", f"{ratio:.2f}x", f"{ttft:.2f} s", f"{decode:.1f} ms"]


def test_the_machine_is_named() -> None:
    with (ROOT / "benchmarks/results/cpu.csv").open() as file:
        row = next(csv.DictReader(file))
    for name in ("cpu", "torch", "transformers", "date"):
        assert row[name] in README
