"""The embedded model, loaded once."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from haystack.tools import Tool

from haystack_integrations.components.generators.turboquant_local import TurboQuantLocalChatGenerator


@pytest.fixture(scope="session")
def tiny_model() -> str:
    return str(Path(__file__).parents[3] / "examples" / "tiny-model")


@pytest.fixture(scope="session")
def weights(tiny_model: str) -> Iterator[None]:
    """Keep the weights in the registry, so that every test's own component loads in no time."""
    keeper = TurboQuantLocalChatGenerator(model=tiny_model)
    keeper.warm_up()
    yield
    keeper.close()


@pytest.fixture
def generator(tiny_model: str, weights: None) -> Iterator[TurboQuantLocalChatGenerator]:
    generator = TurboQuantLocalChatGenerator(model=tiny_model, generation_kwargs={"max_new_tokens": 48})
    yield generator
    generator.close()


@pytest.fixture
def weather() -> Tool:
    """A tool of the kind the embedded model knows; it knows no city but Paris."""

    def get_weather(city: str) -> str:
        return json.dumps({"temperature": {"Paris": 21}[city], "condition": "sunny"})

    city = {"type": "string", "description": "The name of the city"}
    schema = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    return Tool("get_weather", "Get the current weather in a city.", schema, function=get_weather)
