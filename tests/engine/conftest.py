"""Engines on the embedded model and on tiny random ones."""

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from turboquant_local.engine import ChatEngine, Message
from turboquant_local.testing import tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def model_folder() -> str:
    """The embedded model."""
    return str(EXAMPLES / "tiny-model")


@pytest.fixture(scope="session")
def _weights(model_folder: str) -> Iterator[None]:
    """Keeps the embedded model loaded, so that an engine in a test loads at once."""
    with ChatEngine(model_folder, device="cpu"):
        yield


@pytest.fixture
def make_engine(model_folder: str, _weights: None) -> Iterator[Callable[..., ChatEngine]]:
    """Builds engines, on the embedded model if not told otherwise, and closes them after the test."""
    engines: list[ChatEngine] = []

    def make(model: str = model_folder, **fields: Any) -> ChatEngine:
        engines.append(ChatEngine(model, **{"device": "cpu", **fields}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(make_engine: Callable[..., ChatEngine]) -> ChatEngine:
    """An engine on the embedded model with the default cache."""
    return make_engine()


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> Callable[..., str]:
    """Saves a tiny random model of an architecture, with the embedded model's tokenizer, and returns its folder."""
    folders: dict[str, str] = {}

    def save(name: str, **config: object) -> str:
        key = f"{name} {config}"
        if key not in folders:
            folder = tmp_path_factory.mktemp(name)
            tiny_model(name, vocab_size=4096, **config).save_pretrained(folder)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(Path(model_folder) / file, folder / file)
            folders[key] = str(folder)
        return folders[key]

    return save


@pytest.fixture(scope="session")
def long_question() -> Callable[..., Message]:
    """A question about a list of names and numbers that is long enough for most of it to be packed."""
    generator = torch.Generator().manual_seed(0)
    names = ("Ivan", "Noah", "Logan", "Uma", "Rachel", "Chen", "Kevin", "Simon", "Olivia", "Fatima", "Raj", "Arthur")
    surnames = ("Brown", "Wilson", "Kelly", "Young", "Reed")
    people = [f"{name} {surname}" for surname in surnames for name in names]
    numbers = torch.randint(1000, 99999, (len(people),), generator=generator).tolist()

    def ask(who: str, *, last: int = len(people)) -> Message:
        table = "\n".join(f"{person}: {number}" for person, number in list(zip(people, numbers, strict=True))[:last])
        return Message("user", f"Data:\n{table}\n\nWhich value belongs to {who}?")

    return ask


@pytest.fixture(autouse=True)
def no_complaints_from_generate() -> Iterator[None]:
    """Transformers tells about flags that do not fit in its log, not by warnings."""
    records: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.startswith("transformers.generation"):
                records.append(record.getMessage())

    handler = Collect(level=logging.WARNING)
    logging.getLogger("transformers").addHandler(handler)
    yield
    logging.getLogger("transformers").removeHandler(handler)
    assert not records
