"""The house stays tidy: short files, no packages among the tests, documents that lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
SOURCES = sorted(path for folder in ("core", "integrations") for path in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_files_are_short() -> None:
    """About 300 lines, one idea each."""
    lines = {name(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: count for path, count in lines.items() if count > 310} == {}


def test_tests_are_no_packages() -> None:
    """A package named tests/integrations/haystack would hide the real `haystack`."""
    assert [name(path) for path in (ROOT / "tests").rglob("__init__.py")] == []


def test_nothing_shared_is_claimed() -> None:
    """Above our leaf the namespace belongs to all Haystack integrations."""
    leaf = ROOT / "integrations/haystack/haystack_integrations/components/generators/turboquant_local"
    shared = [path for path in (ROOT / "integrations/haystack").rglob("*.*") if path.is_file()]
    assert [name(path) for path in shared if leaf not in path.parents and "__pycache__" not in path.parts] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    local = [target for target in targets if "://" not in target]
    missing = [target for target in local if not (document.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_no_path_of_one_machine(document: Path) -> None:
    absolute = re.findall(r"(?<![\w.\]:/>])/(?:[a-z]+/)+[\w.-]*", document.read_text())
    assert absolute == []
