"""Objects in every form of schema, by every method."""

import json
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, TypedDict

import pytest
from langchain_core.exceptions import OutputParserException
from pydantic import BaseModel, Field
from pydantic.v1 import BaseModel as BaseModelV1

from langchain_turboquant_local import ChatTurboQuantLocal
from langchain_turboquant_local.structured_output import METHODS
from turboquant_local.errors import ConfigError, GenerationOptionError

TEXT = "Maria Reed is 42 years old. Maria Reed lives in Paris.\n\nExtract name, age, city as JSON."
MARIA = {"name": "Maria Reed", "age": 42, "city": "Paris"}


class Person(BaseModel):
    """A person."""

    name: str
    age: int
    city: str


class PersonV1(BaseModelV1):
    """A person."""

    name: str
    age: int
    city: str


class PersonDict(TypedDict):
    """A person."""

    name: str
    age: int
    city: str


PARAMETERS = Person.model_json_schema()
FUNCTION = {"name": "Person", "description": "A person.", "parameters": PARAMETERS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "schema",
    [Person, PersonV1, PersonDict, PARAMETERS, FUNCTION, {"type": "function", "function": FUNCTION}],
    ids=["pydantic", "pydantic v1", "typed dict", "json schema", "function", "tool"],
)
def test_every_schema_by_every_method(model: ChatTurboQuantLocal, schema: Any, method: Any) -> None:
    structured = model.with_structured_output(schema, method=method)
    assert structured.invoke(TEXT) == (schema(**MARIA) if isinstance(schema, type) else MARIA)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schema", [Person, PARAMETERS], ids=["pydantic", "json schema"])
async def test_streamed_and_async(model: ChatTurboQuantLocal, schema: Any, method: Any) -> None:
    structured = model.with_structured_output(schema, method=method)
    expected = schema(**MARIA) if isinstance(schema, type) else MARIA
    assert await structured.ainvoke(TEXT) == expected
    assert list(structured.stream(TEXT))[-1] == expected


@pytest.mark.parametrize("method", METHODS)
def test_raw_message_and_object(model: ChatTurboQuantLocal, method: Any) -> None:
    answer = model.with_structured_output(Person, method=method, include_raw=True).invoke(TEXT)
    assert answer["parsed"] == Person(**MARIA)
    assert answer["parsing_error"] is None
    assert answer["raw"].usage_metadata["output_tokens"] > 0


def test_a_broken_object_is_returned_with_its_error(model: ChatTurboQuantLocal) -> None:
    structured = model.with_structured_output(Person, include_raw=True, max_tokens=4)
    answer = structured.invoke(TEXT)
    assert answer["parsed"] is None
    assert "max_tokens cut it off" in str(answer["parsing_error"])
    assert answer["raw"].response_metadata["finish_reason"] == "length"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schema", [Person, PARAMETERS], ids=["pydantic", "json schema"])
@pytest.mark.parametrize(
    ("limit", "why"), [({"max_tokens": 15}, "max_tokens cut it off"), ({"stop": ["Reed"]}, "a string of stop ended it")]
)
async def test_half_an_object_is_an_error_and_no_object(
    model: ChatTurboQuantLocal, schema: Any, method: Any, limit: Any, why: str
) -> None:
    # LangChain's parsers would complete '{"name": "Maria' to an object.
    structured = model.with_structured_output(schema, method=method, **limit)
    with pytest.raises(OutputParserException, match=why):
        structured.invoke(TEXT)
    with pytest.raises(OutputParserException, match=why):
        await structured.ainvoke(TEXT)
    with pytest.raises(OutputParserException, match=why):
        list(structured.stream(TEXT))


def test_a_number_is_not_cut(model: ChatTurboQuantLocal, script: Callable[..., Any]) -> None:
    class Age(BaseModel):
        age: int

    whole = '{"age": 42}'
    tokens = len(model.get_token_ids(whole))
    script(model, whole, whole)
    with pytest.raises(OutputParserException, match="max_tokens cut it off"):
        model.with_structured_output(Age, max_tokens=tokens - 1).invoke(TEXT)  # '{"age": 42', which parsers mend
    assert model.with_structured_output(Age, max_tokens=tokens).invoke(TEXT) == Age(age=42)


@pytest.mark.parametrize("method", METHODS)
def test_thinking_comes_before_the_object(make_model: Callable[..., ChatTurboQuantLocal], method: Any) -> None:
    model = make_model(output_version="v1", reasoning=True, max_tokens=200)
    answer = model.with_structured_output(Person, method=method, include_raw=True).invoke(TEXT)
    assert isinstance(answer["parsed"], Person)
    assert answer["raw"].content_blocks[0]["type"] == "reasoning"


def test_json_mode_without_a_schema_gives_any_object(model: ChatTurboQuantLocal) -> None:
    answer = model.with_structured_output(method="json_mode").invoke(TEXT)
    assert answer == MARIA
    assert isinstance(json.loads(model.invoke("Hello", response_format={"type": "json_object"}).content), dict)


def test_references_enums_and_recursion(model: ChatTurboQuantLocal, script: Callable[..., Any]) -> None:
    class Color(Enum):
        RED = "red"

    class Node(BaseModel):
        color: Color
        kind: Literal["leaf", "branch"]
        children: list["Node"] = Field(max_length=2)

    tree = '{"color": "red", "kind": "branch", "children": [{"color": "red", "kind": "leaf", "children": []}]}'
    script(model, tree)
    answer = model.with_structured_output(Node, max_tokens=200).invoke("Draw a tree.")
    assert answer == Node.model_validate_json(tree)


def test_a_schema_that_no_grammar_can_express_is_refused_by_its_part(model: ChatTurboQuantLocal) -> None:
    schema = {"title": "odd", "type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    with pytest.raises(GenerationOptionError, match=r"not"):
        model.with_structured_output(schema).invoke("Hello")


def test_what_does_not_fit_is_refused(model: ChatTurboQuantLocal) -> None:
    with pytest.raises(ConfigError, match="method='xml': expected one of function_calling, json_schema, json_mode"):
        model.with_structured_output(Person, method="xml")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"schema=None.*json_mode"):
        model.with_structured_output()
    with pytest.raises(GenerationOptionError, match=r"temprature.*did you mean 'temperature'"):
        model.with_structured_output(Person, temprature=1)
