"""Replies of a random model, held to random schemas, fit them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from turboquant_local.engine import ChatEngine, GenerationOptions, Message, Tool
from turboquant_local.testing import tiny_model

TEMPLATE = (
    "{% for message in messages %}{{ message.content }}<end>{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
)
HELLO = [Message("user", "Hello")]
RUN = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatEngine]:
    """A random model of one layer, with a byte-level tokenizer of 512 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([json.dumps({"name": [i, "a b", None, True, {"é": 1.5}]}) for i in range(99)] * 3, trainer)
    folder = tmp_path_factory.mktemp("random")
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<end>", pad_token="<pad>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    tiny_model("llama", vocab_size=512, num_hidden_layers=1, hidden_size=32, eos_token_id=1).save_pretrained(folder)
    with ChatEngine(str(folder), device="cpu", kv_cache="uncompressed") as engine:
        # A random model hardly ever closes what it has opened: text without a greatest length would not end in time.
        ends = [number for token, number in engine.tokenizer.get_vocab().items() if set('"]},') & set(token)]
        bias = {"sequence_bias": [[[number], 5.0] for number in (*ends, 1)]}
        engine._options = GenerationOptions(temperature=1.0, max_new_tokens=1500, extra=bias)
        yield engine


names = st.text(st.sampled_from('ab cé"/~%\\<#'), min_size=1, max_size=4)
scalars = st.none() | st.booleans() | st.integers(-99, 99) | st.text(st.sampled_from('xyé" \n'), max_size=4)


@st.composite
def ranges(draw: st.DrawFn, low: str, high: str, values: st.SearchStrategy[Any]) -> dict[str, Any]:
    least, most = sorted((draw(values), draw(values)))
    chosen = {low: least, high: most}
    return {key: value for key, value in chosen.items() if key == high or draw(st.booleans())}


def with_type(kind: str, *parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda found: {"type": kind} | {k: v for part in found for k, v in part.items()})


patterns = st.sampled_from(
    [
        {"pattern": "^[a-z]{1,5}$"},
        {"pattern": "^[A-Z][a-z]{0,4}( [A-Z])?$"},
        {"pattern": r"^\d{3}-\d{2}$"},
        {"pattern": "^(red|green|blue)$"},
        {"pattern": "b", "maxLength": 6},
        {"pattern": "^[^x]+$", "minLength": 2, "maxLength": 5},
    ]
)
leaves = st.one_of(
    with_type("string", ranges("minLength", "maxLength", st.integers(0, 9))),
    with_type("string", patterns),
    st.just({"type": "string"}),
    with_type("integer", ranges("minimum", "maximum", st.integers(-2000, 2000))),
    with_type("integer", st.builds(lambda n: {"multipleOf": n}, st.integers(1, 30))),
    with_type("number", ranges("minimum", "maximum", st.integers(-400, 400).map(lambda n: n / 8))),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "number"}, {"type": ["integer", "null"]}]),
    st.lists(scalars, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    scalars.map(lambda value: {"const": value}),
    st.sampled_from(["leaf", "node"]).map(lambda name: {"$ref": f"#/$defs/{name}"}),
)


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(names, inner, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    schema = {"type": "object", "properties": properties, "required": required}
    return schema | draw(
        st.sampled_from([{}, {"additionalProperties": False}, {"additionalProperties": {"type": "null"}}])
    )


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        objects(inner),
        with_type(
            "array", st.builds(lambda items: {"items": items}, inner), ranges("minItems", "maxItems", st.integers(0, 3))
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda choices: {"anyOf": choices}),
        with_type("object", st.builds(lambda values: {"additionalProperties": values, "maxProperties": 2}, inner)),
    )


@st.composite
def schemas(draw: st.DrawFn) -> dict[str, Any]:
    schema = draw(st.one_of(containers(st.recursive(leaves, containers, max_leaves=5)), containers(leaves), leaves))
    node = {
        "type": "object",
        "properties": {
            "value": {"$ref": "#/$defs/leaf"},
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
        },
        "required": ["value"],
    }
    plain = leaves.filter(lambda leaf: "$ref" not in leaf)
    return {**schema, "$defs": {"leaf": draw(plain), "node": node}}


@pytest.mark.slow
def test_texts_fit_random_schemas(engine: ChatEngine) -> None:
    written: list[str] = []
    seen = set()

    @settings(max_examples=600, **RUN)
    @given(schemas())
    def check(schema: dict[str, Any]) -> None:
        if json.dumps(schema) in seen:
            return
        Draft202012Validator.check_schema(schema)
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        reply = engine.chat(HELLO, options=GenerationOptions(response_format=form, seed=len(written)))
        assert reply.finish_reason == "stop", reply.text
        Draft202012Validator(schema).validate(json.loads(reply.text))
        written.append(reply.text)
        seen.add(json.dumps(schema))

    check()
    assert len(seen) >= 500
    assert len(set(written)) > 300, "the model writes always the same"


@pytest.mark.slow
def test_arguments_fit_random_schemas(engine: ChatEngine) -> None:
    called: list[str] = []

    @settings(max_examples=60, **RUN)
    @given(schemas(), schemas())
    def check(first: dict[str, Any], second: dict[str, Any]) -> None:
        tools = [
            Tool(name, "", {"type": "object", "properties": {"x": schema}, "required": ["x"], "$defs": schema["$defs"]})
            for name, schema in (("find", first), ("count", second))
        ]
        options = GenerationOptions(
            tool_choice=("required", "find", "count")[len(called) % 3], parallel_tool_calls=False, seed=len(called)
        )
        reply = engine.chat(HELLO, tools=tools, options=options)
        assert (reply.text, reply.finish_reason, len(reply.tool_calls)) == ("", "tool_calls", 1)
        called.append(reply.tool_calls[0].name)
        tool = next(tool for tool in tools if tool.name == called[-1])
        Draft202012Validator(tool.parameters).validate(reply.tool_calls[0].arguments)

    check()
    assert set(called) == {"find", "count"}
