"""The embedded model, and a script that puts words into its mouth."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.tools import BaseTool, tool

from langchain_turboquant_local import ChatTurboQuantLocal
from turboquant_local.engine import ChatEngine

TINY_MODEL = str(Path(__file__).parents[3] / "examples" / "tiny-model")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that this machine's user has set changes a test."""
    for name in ("HF_TOKEN", "HF_API_TOKEN", "LC_OUTPUT_VERSION", "LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny_model() -> Iterator[str]:
    """The embedded model, kept loaded, so that a test's own chat model loads in no time."""
    with ChatEngine(TINY_MODEL, device="cpu"):
        yield TINY_MODEL


@pytest.fixture
def make_model(tiny_model: str) -> Iterator[Callable[..., ChatTurboQuantLocal]]:
    """Builds chat models on the embedded model and closes them after the test."""
    models: list[ChatTurboQuantLocal] = []

    def make(**settings: Any) -> ChatTurboQuantLocal:
        models.append(ChatTurboQuantLocal(**{"model": tiny_model, "device": "cpu", "max_tokens": 48, **settings}))
        return models[-1]

    yield make
    for model in models:
        model.close()


@pytest.fixture
def model(make_model: Callable[..., ChatTurboQuantLocal]) -> ChatTurboQuantLocal:
    return make_model()


@pytest.fixture
def weather() -> BaseTool:
    """A tool of the kind the embedded model knows."""

    @tool
    def get_weather(city: str) -> str:
        """Get the current weather in a city."""
        return {"Paris": '{"temperature": 21, "condition": "sunny"}'}[city]

    return get_weather


def torch_model(model: ChatTurboQuantLocal) -> torch.nn.Module:
    """The weights that a chat model runs; loads them."""
    loaded = model.load()._engine(model.model)._loaded
    assert loaded is not None
    return loaded.model


@pytest.fixture
def gate(gate: Callable[..., Any]) -> Callable[..., Any]:
    """Puts a gate before the forward pass of a chat model."""

    def put(model: ChatTurboQuantLocal, permits: int = 100_000) -> Any:
        return gate(model._engine(model.model), permits)

    return put


class Script:
    """Makes one token after the other of given replies the only likely one, whatever the model thinks.

    The tokens go the way of all tokens: grammar, sampling, cache, decoding and parsing are the engine's own. A token
    that a grammar forbids is not taken, so what comes out then is not what was written.
    """

    def __init__(self, replies: list[list[int]]) -> None:
        self._replies = replies
        self._at = 0

    @property
    def is_done(self) -> bool:
        """Whether all replies were given."""
        return not self._replies or (len(self._replies) == 1 and self._is_said)

    @property
    def _is_said(self) -> bool:
        """Whether a reply is out but for its end token, which a grammar that is complete does not wait for."""
        return self._at == len(self._replies[0]) - 1

    def __call__(self, module: torch.nn.Module, args: object, kwargs: dict[str, Any], output: Any) -> None:
        """The hook: more than one input token means that a prompt is read, so that a reply begins."""
        if kwargs["input_ids"].shape[1] > 1:
            if self._replies and self._is_said:
                del self._replies[0]
            self._at = 0
        if not self._replies:
            return
        output.logits.fill_(-100.0)
        output.logits[..., self._replies[0][self._at]] = 100.0
        self._at += 1
        if self._at == len(self._replies[0]):
            del self._replies[0]
            self._at = 0


@pytest.fixture
def script() -> Iterator[Callable[..., Script]]:
    """Makes a chat model answer with given texts, one a call."""
    hooks = []

    def put(model: ChatTurboQuantLocal, *replies: str) -> Script:
        weights = torch_model(model)
        end = weights.config.eos_token_id
        ids = [[*model.get_token_ids(reply), end[0] if isinstance(end, list) else end] for reply in replies]
        made = Script(ids)
        hooks.append(weights.register_forward_hook(made, with_kwargs=True))
        return made

    yield put
    for hook in hooks:
        hook.remove()
