"""The package's docstring shows what happens: its cells run, in order, and print what stands below them."""

import re
from pathlib import Path
from textwrap import dedent

import pytest

import langchain_turboquant_local
from langchain_turboquant_local import ChatTurboQuantLocal

CELL = re.compile(
    r" *\.\. code-block:: python\n\n((?: {8}.*\n|\n)+)(?: *\.\. code-block:: text\n\n((?: {8}.*\n|\n)+))?"
)


def test_cells_print_what_they_say(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(tiny_model).parents[1])
    cells = CELL.findall(langchain_turboquant_local.__doc__ or "")
    assert len(cells) == 8
    assert sum(bool(expected) for _, expected in cells) == 7
    namespace: dict[str, object] = {}
    for source, expected in cells:
        exec(compile(dedent(source), "docstring", "exec"), namespace)
        assert capsys.readouterr().out.split() == expected.split(), source
    model = namespace["model"]
    assert isinstance(model, ChatTurboQuantLocal)
    model.close()
