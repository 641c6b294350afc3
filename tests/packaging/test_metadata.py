"""Names, versions and extras agree wherever they are written."""

import importlib.metadata
import itertools
import re
import tomllib
from pathlib import Path

import turboquant_local

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_public_names() -> None:
    assert {"TurboQuantConfig", "TurboQuantCache", "ChatEngine"} <= set(turboquant_local.__all__)
    assert [name for name in turboquant_local.__all__ if not hasattr(turboquant_local, name)] == []


def test_one_version() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"] == turboquant_local.__version__
    assert importlib.metadata.version("turboquant-local") == turboquant_local.__version__


def test_extras() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"cli", "haystack", "langchain", "plot", "server", "vllm", "all", "dev"}
    everything = re.search(r"\[(.*)\]", extras["all"][0])
    assert everything is not None
    assert set(everything[1].split(",")) == set(extras) - {"all", "dev"}


def test_every_requirement_is_pinned_in_the_constraints() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    pins = {normal(name) for name in re.findall(r"^([\w.-]+)==", constraints, re.MULTILINE)}
    wanted = itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    names = {normal(re.split(r"[<>=\[ ]", line)[0]) for line in wanted} - {"turboquant-local"}
    names -= {"triton"}  # a torch for CUDA pins its own
    assert names - pins == set()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
