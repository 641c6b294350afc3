"""The command line, run in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from turboquant_local.cli.app import app

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    """Run a command line given as words, 80 columns wide."""

    def run(*words: str | Path) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words], prog_name="turboquant-local", terminal_width=80)

    return run


@pytest.fixture
def quick() -> list[str]:
    """Options of a measurement that takes a second."""
    return ["--model", "testing:llama", "--device", "cpu", "--window", "260", "--windows", "2"]
