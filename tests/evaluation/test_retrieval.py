"""Prompts of exact length with the fact where it should be, and a score that knows a good cache from a bad one."""

import random
from pathlib import Path

import pytest
import torch

from turboquant_local.engine.loading import LoadedModel
from turboquant_local.errors import EvaluationError
from turboquant_local.evaluation.codecs.registry import find_codec
from turboquant_local.evaluation.decoding import Prompt, decode, end_ids
from turboquant_local.evaluation.fidelity import UNCOMPRESSED
from turboquant_local.evaluation.haystack import Haystack
from turboquant_local.evaluation.models import load_model
from turboquant_local.evaluation.retrieval import TASKS, RetrievalCell, Task, accuracy, make_prompts, measure_retrieval
from turboquant_local.evaluation.words import WORDS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "examples/alice.txt").read_text()


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model(str(ROOT / "examples/tiny-model"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def haystack(tiny: LoadedModel) -> Haystack:
    return Haystack(tiny.tokenizer, TEXT)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [512, 777])
def test_prompts_have_the_length_asked_for(haystack: Haystack, task: Task, length: int) -> None:
    prompts = make_prompts(haystack, task, length, 0.5, 3)
    assert {len(prompt.ids) for prompt in prompts} == {length}
    assert len({prompt.answer for prompt in prompts}) == 3
    assert prompts == make_prompts(haystack, task, length, 0.5, 3)
    assert prompts != make_prompts(haystack, task, length, 0.5, 3, seed=1)


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_stands_in_the_document_and_not_in_the_question(
    tiny: LoadedModel, haystack: Haystack, task: Task
) -> None:
    for prompt in make_prompts(haystack, task, 600, 0.3, 5):
        document = tiny.tokenizer.decode(prompt.ids[: -prompt.question_length])
        question = tiny.tokenizer.decode(prompt.ids[-prompt.question_length :])
        assert prompt.answer in document
        assert prompt.answer not in question
        assert question.startswith("\n\nWhat is the ")
        assert question.endswith("<|im_start|>assistant\n")
        if task != "passkey":
            name = question.removesuffix("?<|im_end|>\n<|im_start|>assistant\n").split()[-1]
            before = document[: document.index(prompt.answer)]
            assert before.endswith(f"code for {name} is " if task == "pairs" else f"\n{name}: ")


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_fact_lies_at_its_depth(tiny: LoadedModel, haystack: Haystack, depth: float) -> None:
    for prompt in make_prompts(haystack, "passkey", 2000, depth, 3):
        document = tiny.tokenizer.decode(prompt.ids)
        assert document.index(prompt.answer) / len(document) == pytest.approx(depth, abs=0.04)


def test_the_tiny_model_finds_what_a_good_cache_keeps_and_not_what_a_bad_one_lost(tiny: LoadedModel) -> None:
    codecs = [UNCOMPRESSED, find_codec("balanced"), find_codec("plain-turboquant-4:k_bits=1,v_bits=1")]
    told: list[str] = []
    cells = measure_retrieval(
        tiny, TEXT, codecs, tasks=["pairs"], lengths=[600], depths=[0.3, 0.6], samples=5, on_progress=told.append
    )
    assert told == [codec.name for codec in codecs] * 2
    assert [(cell.codec, cell.depth) for cell in cells] == [(codec.name, d) for d in (0.3, 0.6) for codec in codecs]
    exact, good, bad = (accuracy(cells, codec.name) for codec in codecs)
    assert exact >= 0.9
    assert good == exact
    assert bad <= exact - 0.3


def test_decoding_is_that_of_generate(tiny: LoadedModel, haystack: Haystack) -> None:
    prompts = make_prompts(haystack, "passkey", 300, 0.5, 2)
    stops = end_ids(tiny)
    replies = decode(tiny, prompts, UNCOMPRESSED, max_new_tokens=12)
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = tiny.model.generate(torch.tensor([prompt.ids]), max_new_tokens=12, do_sample=False, eos_token_id=stops)
        assert reply == tiny.tokenizer.decode(ids[0, 300:], skip_special_tokens=True)


def test_a_model_without_a_chat_template_is_asked_plainly() -> None:
    loaded = load_model("testing:llama", device="cpu")
    haystack = Haystack(loaded.tokenizer, TEXT)
    (prompt,) = make_prompts(haystack, "passkey", 400, 0.5, 1)
    assert loaded.tokenizer.decode(prompt.ids).endswith("\n\nWhat is the pass key?\nAnswer:")
    cells = measure_retrieval(loaded, TEXT, [UNCOMPRESSED], tasks=["passkey"], lengths=[400], depths=[0.5], samples=2)
    assert cells == [RetrievalCell("uncompressed", "passkey", 400, 0.5, 0, 2)]  # it knows nothing


def test_accuracy_is_over_all_prompts() -> None:
    cells = [RetrievalCell("a", "list", 10, 0, 3, 4), RetrievalCell("a", "list", 20, 0, 0, 2)]
    assert accuracy([*cells, RetrievalCell("b", "list", 10, 0, 4, 4)], "a") == 0.5


def test_what_does_not_fit_is_refused(haystack: Haystack, tiny: LoadedModel) -> None:
    with pytest.raises(EvaluationError, match=r"length=100: 16 facts and the question need \d+ tokens"):
        make_prompts(haystack, "pairs", 100, 0.5, 1)
    with pytest.raises(EvaluationError, match="task='passkeys': expected one of passkey, pairs, list"):
        make_prompts(haystack, "passkeys", 512, 0.5, 1)  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match=r"lengths=\[512, 4090\]: this model has a context of 4096 tokens"):
        measure_retrieval(tiny, "One sentence.", [UNCOMPRESSED], lengths=[512, 4090])
    with pytest.raises(EvaluationError, match="expected sentences"):
        Haystack(tiny.tokenizer, "Short.")


def test_running_text_is_exactly_as_long_as_the_room(haystack: Haystack) -> None:
    rng = random.Random(0)
    for length in range(200, 230):
        prompt = haystack.prompt(length, [(0.0, "One."), (1.0, "Two.")], "What?", "", rng)
        assert isinstance(prompt, Prompt)
        assert len(prompt.ids) == length


def test_words_differ() -> None:
    assert len(set(WORDS)) == len(WORDS) > 100


def test_the_question_comes_after_the_document_is_packed(tiny: LoadedModel, haystack: Haystack) -> None:
    prompts = make_prompts(haystack, "pairs", 512, 0.5, 4)
    fed: list[int] = []
    hook = tiny.model.register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[1]))
    decode(tiny, prompts, find_codec("balanced"), max_new_tokens=3)
    hook.remove()
    longest = max(prompt.question_length for prompt in prompts)
    assert fed == [512 - longest, longest, 1, 1]
