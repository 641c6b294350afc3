"""Requests for tools, their prompts, and a score that knows valid from correct."""

import json
from pathlib import Path

import jsonschema
import pytest

from turboquant_local.engine.loading import LoadedModel
from turboquant_local.errors import ChatTemplateError
from turboquant_local.evaluation import tool_calls
from turboquant_local.evaluation.codecs.registry import find_codec
from turboquant_local.evaluation.decoding import Prompt
from turboquant_local.evaluation.fidelity import UNCOMPRESSED
from turboquant_local.evaluation.models import load_model
from turboquant_local.evaluation.tool_calls import make_requests, measure_tool_calls, parse

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model(str(ROOT / "examples/tiny-model"), device="cpu", dtype="float32")


def test_the_expected_call_fits_the_tool_and_stands_in_the_request() -> None:
    requests = make_requests(20)
    assert requests == make_requests(20)
    assert requests != make_requests(20, seed=1)
    for request in requests:
        (tool,) = (tool for tool in request.tools if tool.name == request.call.name)
        jsonschema.validate(request.call.arguments, dict(tool.parameters))
        assert len({tool.name for tool in request.tools}) == 4
        assert all(str(value) in request.text for value in (tool.name, *request.call.arguments.values()))


def test_valid_and_correct_are_told_apart(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = make_requests(4)

    def call(index: int, count: str) -> str:
        request = requests[index]
        body = {"name": request.call.name + count, "arguments": request.call.arguments}
        return f"<tool_call>\n{json.dumps(body)}\n</tool_call>"

    replies = iter([call(0, ""), call(1, "_2"), "I cannot.", call(3, "")[:-20]])
    monkeypatch.setattr(tool_calls, "decode", lambda *args, **kwargs: [next(replies)])
    (score,) = measure_tool_calls(tiny, [UNCOMPRESSED], samples=4)
    assert (score.valid, score.correct, score.total) == (2, 1, 4)


def test_the_request_reads_the_tools_from_the_cache(tiny: LoadedModel) -> None:
    request = make_requests(1)[0]
    prompt = tool_calls._prompt(tiny.tokenizer, request)
    assert isinstance(prompt, Prompt)
    question = tiny.tokenizer.decode(prompt.ids[-prompt.question_length :])
    assert question == f"{request.text}<|im_end|>\n<|im_start|>assistant\n"


def test_the_tiny_model_calls_tools(tiny: LoadedModel) -> None:
    told: list[str] = []
    codecs = [UNCOMPRESSED, find_codec("balanced")]
    exact, compressed = measure_tool_calls(tiny, codecs, samples=3, on_progress=told.append)
    assert told == ["uncompressed", "balanced"] * 3
    assert exact.valid == compressed.valid == 3
    assert exact.correct == compressed.correct >= 2


def test_a_model_without_a_template_is_refused() -> None:
    with pytest.raises(ChatTemplateError):
        measure_tool_calls(load_model("testing:llama", device="cpu"), [UNCOMPRESSED], samples=1)


def test_text_without_a_call_is_none(tiny: LoadedModel) -> None:
    assert parse("Nothing to call.", make_requests(1)[0].tools, tiny.tokenizer) == ()
