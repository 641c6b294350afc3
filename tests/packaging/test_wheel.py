"""The wheel holds three import roots and nothing of the workshop."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HAYSTACK_LEAF = "haystack_integrations/components/generators/turboquant_local/"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from this checkout, without network and without an environment of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def modules(wheel: zipfile.ZipFile) -> list[str]:
    return [name for name in wheel.namelist() if ".dist-info/" not in name]


def test_three_import_roots(wheel: zipfile.ZipFile) -> None:
    roots = {name.split("/")[0] for name in modules(wheel)}
    assert roots == {"turboquant_local", "haystack_integrations", "langchain_turboquant_local"}


def test_only_python_and_type_markers(wheel: zipfile.ZipFile) -> None:
    assert {Path(name).suffix for name in modules(wheel)} == {".py", ".typed"}


def test_every_source_file_is_in_it(wheel: zipfile.ZipFile) -> None:
    roots = (ROOT / "core", ROOT / "integrations/haystack", ROOT / "integrations/langchain")
    sources = {path.relative_to(root).as_posix() for root in roots for path in root.rglob("*.py")}
    assert sources == {name for name in modules(wheel) if name.endswith(".py")}


def test_the_shared_namespace_stays_shared(wheel: zipfile.ZipFile) -> None:
    ours = [name for name in modules(wheel) if name.startswith("haystack_integrations/")]
    assert ours
    assert all(name.startswith(HAYSTACK_LEAF) for name in ours)


def test_type_markers_lie_in_our_own_leaves(wheel: zipfile.ZipFile) -> None:
    markers = {name for name in modules(wheel) if name.endswith("py.typed")}
    assert markers == {
        "turboquant_local/py.typed",
        HAYSTACK_LEAF + "py.typed",
        "langchain_turboquant_local/py.typed",
    }


def test_licences_travel_with_it(wheel: zipfile.ZipFile) -> None:
    licences = {Path(name).name for name in wheel.namelist() if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}
