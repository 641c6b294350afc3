"""The mask itself: where replies may end, what stands in strings, and tokenizers and models that do not match."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from turboquant_local.engine import GenerationOptions
from turboquant_local.engine.grammar import Constraint, make_constraint
from turboquant_local.engine.options import check_options
from turboquant_local.engine.reply_form import ReplyForm
from turboquant_local.errors import BackendError, GenerationOptionError

WORDS = AutoTokenizer.from_pretrained(str(Path(__file__).parents[2] / "examples" / "tiny-model"))
END, TOOL_CALL, THINK, THINK_END = (
    WORDS.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<tool_call>", "<think>", "</think>")
)


def held(schema: Any, **fields: Any) -> Constraint:
    form = ReplyForm((), schema, several_calls=False)
    return make_constraint(form, WORDS, **{"prompt_end": "", "may_think": False, "end_ids": [END, 0], **fields})


def allowed(constraint: Constraint, size: int = 4096) -> set[int]:
    scores = constraint(torch.empty(1, 0, dtype=torch.long), torch.zeros(1, size))
    assert scores.shape == (1, size)
    return set(scores[0].isfinite().nonzero()[:, 0].tolist())


def take(constraint: Constraint, text: str) -> bool:
    """Take a text, each token of which must be allowed; returns whether the reply is complete."""
    complete = False
    for token in WORDS(text, add_special_tokens=False)["input_ids"]:
        assert token in allowed(constraint), (text, WORDS.decode([token]))
        complete = constraint.accept(token)
    return complete


def test_an_end_only_where_the_text_is_whole() -> None:
    constraint = held({"type": "integer", "minimum": 10, "maximum": 250})
    assert not allowed(constraint) & {END, 0}
    assert not take(constraint, "1")
    assert not allowed(constraint) & {END, 0}
    assert not take(constraint, "7")
    assert {END, 0} < allowed(constraint)  # 17 may end here, or go on as 170
    assert take(constraint, "0")
    nothing = torch.zeros(1, 4096)
    assert constraint(torch.empty(1, 0), nothing) is nothing  # a step too many does no harm


def test_no_marks_and_nothing_broken_in_a_string() -> None:
    constraint = held({"type": "string"})
    take(constraint, '"a')
    marks = {number for number, token in WORDS.added_tokens_decoder.items()}
    assert {END, TOOL_CALL, THINK} < marks
    assert not marks & allowed(constraint)
    assert {WORDS.convert_tokens_to_ids(token) for token in ("b", "Ġ", '"', "\\")} < allowed(constraint)
    assert not {WORDS.convert_tokens_to_ids("Ċ")} & allowed(constraint)  # a line break must be escaped
    # A character of several tokens is finished before anything else.
    first = WORDS("\N{SNOWMAN}", add_special_tokens=False)["input_ids"]
    assert len(first) > 1
    constraint.accept(first[0])
    assert not {WORDS.convert_tokens_to_ids("b"), WORDS.convert_tokens_to_ids('"')} & allowed(constraint)


def test_models_with_more_or_fewer_logits_than_tokens() -> None:
    schema = {"enum": ["yes"]}
    assert allowed(held(schema), 5000) == allowed(held(schema))
    assert allowed(held(schema), 300) == {number for number in allowed(held(schema)) if number < 300}


def test_what_others_ruled_out_is_chosen_when_nothing_else_is_allowed() -> None:
    constraint = held({"const": True})
    scores = torch.full((1, 4096), -torch.inf)
    scores[0, 17] = 3.0
    chosen = int(constraint(torch.empty(1, 0), scores).argmax())
    assert chosen in allowed(constraint)


@pytest.mark.parametrize(
    ("prompt_end", "may_think", "begins"),
    [
        ("<|im_start|>assistant", False, {"{"}),
        # This template opens the block itself when asked to: a model that was not asked does not think.
        ("<|im_start|>assistant", True, {"{"}),
        ("<|im_start|>assistant\n<think>\n\n</think>", True, {"{"}),
        ("<|im_start|>assistant\n<think>", True, {"{", "a", "<think>", "</think>"}),
    ],
)
def test_thinking_is_free(prompt_end: str, may_think: bool, begins: set[str]) -> None:
    constraint = held({"type": "object"}, prompt_end=prompt_end, may_think=may_think)
    tokens = {token: WORDS.convert_tokens_to_ids(token) for token in ("{", "a", "<think>", "</think>")}
    first = allowed(constraint)
    assert {token for token, number in tokens.items() if number in first} == begins
    assert END not in first
    if "a" in begins:
        assert not take(constraint, "Is {it\n\n right?</think>\n\n")
        assert not allowed(constraint) & {tokens["a"], THINK, THINK_END, END}
        assert take(constraint, "{}")


def test_a_model_that_opens_the_block_itself() -> None:
    words = AutoTokenizer.from_pretrained(WORDS.name_or_path)
    words.chat_template = "{{ messages[0].content }}{% if enable_thinking is false %}<think>\n\n</think>{% endif %}"
    form = ReplyForm((), {"type": "object"}, several_calls=False)
    for may_think in (True, False):
        constraint = make_constraint(form, words, prompt_end="?", may_think=may_think, end_ids=[END])
        assert (THINK in allowed(constraint)) == may_think
        if may_think:
            assert take(constraint, "<think>\nLet me see.\n</think>\n\n{}")


def test_marks_of_thinking_that_are_text() -> None:
    description = json.loads(WORDS.backend_tokenizer.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["special"]]
    names = {"<think>": "<unused_1>", "</think>": "<unused_2>"}
    description["model"]["vocab"] = {names.get(t, t): number for t, number in description["model"]["vocab"].items()}
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), eos_token="<|im_end|>"
    )
    form = ReplyForm((), {"type": "object"}, several_calls=False)
    constraint = make_constraint(form, words, prompt_end="<think>", may_think=True, end_ids=[END])
    text = words("so < be it</think>\n{}", add_special_tokens=False)["input_ids"]
    assert len(text) > 8
    assert [constraint.accept(token) for token in text] == [False] * (len(text) - 1) + [True]


def test_a_compiled_grammar_is_kept_and_not_used_up() -> None:
    first, second = held({"enum": ["yes", "no"]}), held({"enum": ["yes", "no"]})
    assert take(first, '"yes"')
    assert take(second, '"no"')


def test_a_token_that_does_not_fit_is_an_error() -> None:
    constraint = held({"const": 1})
    with pytest.raises(GenerationOptionError, match="the grammar cannot go on"):
        constraint.accept(TOOL_CALL)


def test_a_tokenizer_that_cannot_be_read() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b")
    with pytest.raises(BackendError, match=r"constrained decoding cannot read this tokenizer .*byte-level"):
        make_constraint(ReplyForm((), {}, False), made, prompt_end="", may_think=False, end_ids=[1])


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    schema = {"const": "asked for while the library is missing"}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    with pytest.raises(BackendError, match="need llguidance, which is not installed: pip install llguidance"):
        check_options(GenerationOptions(response_format=form))
    check_options(GenerationOptions(response_format={"type": "text"}, tool_choice="none"))
