"""The entry point: version, missing extras, and a document that shows the real help."""

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from click.testing import Result

from turboquant_local import __version__

Invoke = Callable[..., Result]
ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/evaluation.md"


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").stdout == f"turboquant-local {__version__}\n"


def test_no_command_shows_the_help(invoke: Invoke) -> None:
    assert "verify" in invoke().output


def test_the_console_script_is_the_entry_point() -> None:
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"turboquant-local": "turboquant_local.cli.main:main"}
    for script in entry_points(group="console_scripts", name="turboquant-local"):
        assert script.value == scripts["turboquant-local"]


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_a_missing_extra_is_named(module: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; from turboquant_local.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"turboquant-local: {module} is not installed; pip install 'turboquant-local[cli]'\n"


def test_plots_without_matplotlib_name_the_extra(
    invoke: Invoke, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = invoke("verify", *quick, "--plot", "plot.png")
    assert done.exit_code == 2
    assert "matplotlib is not installed; pip install 'turboquant-local[plot]'" in done.stderr


@pytest.mark.parametrize("command", ["verify", "compare", "tune"])
def test_the_document_shows_the_help_as_it_is(invoke: Invoke, command: str) -> None:
    """Copy the printed help into the document when this fails."""
    shown = re.search(rf"```\n\$ turboquant-local {command} --help\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == invoke(command, "--help").stdout


def test_the_documents_example_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    exec(compile(code, DOCUMENT.name, "exec"), {})
    assert re.search(r"passkey 600 0\.5 \d/5\n", capsys.readouterr().out)
