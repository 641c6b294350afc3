"""What ChatHuggingFace over HuggingFacePipeline does wrong, done right.

Its lack of async, of objects for schemas and of a profile: `test_streaming`, `test_structured_output`, `test_profile`.
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import BaseTool
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from langchain_turboquant_local import ChatTurboQuantLocal
from turboquant_local.testing import tiny_model as random_model

FRANCE = "What is the capital of France?"
PARIS = "The capital of France is Paris."
WEATHER = "What is the weather in Paris?"


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Callable[[ChatTurboQuantLocal], list[int]]:
    """Collects the token ids that a model is given."""

    def watch(model: ChatTurboQuantLocal) -> list[int]:
        ids: list[int] = []

        def note(module: torch.nn.Module, args: object, kwargs: dict[str, Any]) -> None:
            ids.extend(kwargs["input_ids"][0].tolist())

        loaded = model.load()._engine(model.model)._loaded
        assert loaded is not None
        hook = loaded.model.register_forward_pre_hook(note, with_kwargs=True)
        request.addfinalizer(hook.remove)
        return ids

    return watch


def test_the_reply_does_not_begin_with_the_prompt(model: ChatTurboQuantLocal) -> None:
    assert model.invoke(FRANCE).content == PARIS


def test_tools_reach_the_template_and_calls_are_parsed(
    model: ChatTurboQuantLocal, weather: BaseTool, seen: Callable[[ChatTurboQuantLocal], list[int]]
) -> None:
    ids = seen(model)
    answer = model.bind_tools([weather]).invoke(WEATHER)
    tokenizer = model._engine(model.model).tokenizer
    assert "Get the current weather in a city." in tokenizer.decode(ids)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    assert answer.content == ""


def test_a_history_with_tool_results_is_answered(model: ChatTurboQuantLocal, weather: BaseTool) -> None:
    bound = model.bind_tools([weather])
    question = HumanMessage(WEATHER)
    call = bound.invoke([question])
    answer = bound.invoke([question, call, weather.invoke(call.tool_calls[0])])
    assert "21" in answer.text


def test_tool_choice_any_is_no_name_of_a_function(model: ChatTurboQuantLocal, weather: BaseTool) -> None:
    answer = model.bind_tools([weather], tool_choice="any").invoke("Hello!")
    assert [call["name"] for call in answer.tool_calls] == ["get_weather"]


def test_response_format_is_kept(model: ChatTurboQuantLocal) -> None:
    choice = {"type": "object", "properties": {"answer": {"enum": ["yes", "no"]}}, "required": ["answer"]}
    answer = model.invoke("Hello", response_format={"type": "json_schema", "json_schema": {"schema": choice}})
    assert answer.content in ('{"answer": "yes"}', '{"answer": "no"}')


def test_usage_model_and_finish_reason_are_told(model: ChatTurboQuantLocal, tiny_model: str) -> None:
    answer = model.invoke(FRANCE)
    assert answer.usage_metadata == {
        "input_tokens": 15,
        "output_tokens": 8,
        "total_tokens": 23,
        "input_token_details": {"cache_read": 0},
        "output_token_details": {"reasoning": 0},
    }
    assert answer.response_metadata["model_name"] == tiny_model
    assert answer.response_metadata["finish_reason"] == "stop"
    assert model.invoke(FRANCE, max_tokens=3).response_metadata["finish_reason"] == "length"


@pytest.mark.parametrize("settings", [{}, {"stop": ["Fr"]}])
def test_stop_strings_end_the_reply_and_are_left_out(
    make_model: Callable[..., ChatTurboQuantLocal], settings: dict[str, Any]
) -> None:
    model = make_model(**settings)
    answer = model.invoke(FRANCE, **({} if settings else {"stop": ["Fr"]}))
    assert answer.content == "The capital of "
    assert answer.response_metadata["finish_reason"] == "stop"


def test_max_tokens_and_temperature_on_the_model_count(make_model: Callable[..., ChatTurboQuantLocal]) -> None:
    short = make_model(max_tokens=3).invoke(FRANCE)
    assert short.usage_metadata is not None
    assert short.usage_metadata["output_tokens"] == 3
    hot = make_model(temperature=5.0, top_k=0, top_p=1.0, seed=1)
    assert hot.invoke(FRANCE).content != PARIS
    assert hot.invoke(FRANCE).content == hot.invoke(FRANCE).content


def test_the_prompt_has_one_bos(
    tmp_path: Path,
    tiny_model: str,
    make_model: Callable[..., ChatTurboQuantLocal],
    seen: Callable[[ChatTurboQuantLocal], list[int]],
) -> None:
    weights = random_model("llama", vocab_size=4096)
    weights.save_pretrained(tmp_path)
    shutil.copy(Path(tiny_model) / "chat_template.jinja", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    bos = ("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    tokenizer.bos_token = bos[0]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("Hello").input_ids[0] == bos[1]

    model = make_model(model=str(tmp_path), max_tokens=1)
    ids = seen(model)
    model.invoke("Hello")
    assert ids[0] == bos[1]
    assert ids.count(bos[1]) == 1


def test_calls_do_not_change_each_other(model: ChatTurboQuantLocal) -> None:
    first = model.invoke(FRANCE).content
    model.invoke("What is the capital of Italy?")
    assert model.invoke(FRANCE).content == first == PARIS


def test_a_closed_stream_leaves_no_thread(
    model: ChatTurboQuantLocal, gate: Callable[..., Any], tiny_model: str
) -> None:
    steps = gate(model)
    stream = model.stream("Write a story about a cat.")
    next(stream)
    stream.close()
    at_close = steps.steps
    assert not [thread for thread in threading.enumerate() if thread.name == "turboquant-generation"]
    assert model.invoke(FRANCE).content == PARIS
    assert steps.steps > at_close


def test_tokens_are_counted_by_the_models_own_tokenizer(model: ChatTurboQuantLocal, weather: BaseTool) -> None:
    tokenizer = model._engine(model.model).tokenizer
    assert model.get_token_ids("Überraschung 123") == tokenizer("Überraschung 123").input_ids
    question = HumanMessage(WEATHER)
    for bound, tools in ((model, None), (model.bind_tools([weather]), [weather])):
        answer = bound.invoke([question])
        assert isinstance(answer, AIMessage)
        assert answer.usage_metadata is not None
        assert model.get_num_tokens_from_messages([question], tools) == answer.usage_metadata["input_tokens"]
    assert model.get_num_tokens_from_messages([ToolMessage("21", tool_call_id="1")]) > 0
    assert model.get_num_tokens_from_messages([]) == 0
