"""Plots and the tables of GPU figures, from the rows: drawn, and the newest ones on the pages."""

import runpy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plots() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks/plots.py"))


@pytest.mark.parametrize("page", ["README.md", "docs/gpu.md"])
def test_the_pages_have_the_figures_of_the_rows(plots: dict[str, Any], page: str) -> None:
    text = (ROOT / page).read_text()
    assert "| ours" in text or "| context |" in text
    assert plots["filled"](text) == text, "python benchmarks/plots.py brings it up to date"


def test_a_failed_way_is_named_by_its_error(plots: dict[str, Any]) -> None:
    row = {"ms_a_token": "", "decoding": "TypeError: no such thing"}
    assert plots["cell"](row, "ms_a_token", 1) == "TypeError"
    assert plots["cell"]({**row, "ms_a_token": "6.19"}, "ms_a_token", 1) == "6.2"


def test_all_plots_are_drawn(plots: dict[str, Any], tmp_path: Path) -> None:
    plots["draw"](tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"decode_attention.svg", "ms_a_token.svg", "peak_memory.svg"}
    for name in drawn:
        assert (ROOT / "docs" / name).exists()
