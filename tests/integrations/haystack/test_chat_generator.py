import contextlib
import contextvars
import copy
import json
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from haystack import tracing
from haystack.components.generators.utils import _convert_streaming_chunks_to_chat_message
from haystack.dataclasses import ChatMessage, ReasoningContent, StreamingChunk, TextContent, ToolCall
from haystack.tools import Tool
from transformers import AutoTokenizer

from haystack_integrations.components.generators.turboquant_local import MetricsCallback, TurboQuantLocalChatGenerator

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
COUNT = "Count from 1 to 40."


def _ask(generator: TurboQuantLocalChatGenerator, messages: Any, **words: Any) -> ChatMessage:
    replies = generator.run(messages, **words)["replies"]
    assert len(replies) == 1
    return replies[0]


def test_a_text_and_a_message_get_the_same_answer(generator: TurboQuantLocalChatGenerator) -> None:
    assert _ask(generator, QUESTION).text == ANSWER
    assert _ask(generator, [ChatMessage.from_user(QUESTION)]).text == ANSWER


def test_no_messages_get_no_reply_and_load_nothing(tmp_path: Path) -> None:
    generator = TurboQuantLocalChatGenerator(model=str(tmp_path / "nothing here"))

    assert generator.run([]) == {"replies": []}


def test_meta_is_complete_exact_and_json_safe(generator: TurboQuantLocalChatGenerator, tiny_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
    )

    meta = _ask(generator, QUESTION).meta

    completion = len(tokenizer(ANSWER)["input_ids"]) + 1  # the end token
    assert meta["model"] == tiny_model
    assert meta["index"] == 0
    assert meta["finish_reason"] == "stop"
    assert meta["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": completion,
        "total_tokens": len(prompt) + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    requested = datetime.fromisoformat(meta["turboquant"]["requested_at"])
    assert 0 < (datetime.fromisoformat(meta["completion_start_time"]) - requested).total_seconds() < 60
    assert meta["turboquant"]["vram_bytes"] == generator.vram_bytes() > 0
    assert meta["turboquant"]["kv_cache"]["preset"] == "balanced"
    assert json.loads(json.dumps(meta)) == meta


def test_a_reply_that_is_cut_says_so(generator: TurboQuantLocalChatGenerator) -> None:
    reply = _ask(generator, COUNT, generation_kwargs={"max_new_tokens": 5})

    assert reply.meta["finish_reason"] == "length"
    assert reply.meta["usage"]["completion_tokens"] == 5


def test_stop_words_of_constructor_and_run_both_hold(tiny_model: str) -> None:
    generator = TurboQuantLocalChatGenerator(model=tiny_model, stop_words=[" 9,"])

    assert _ask(generator, COUNT).text == "1, 2, 3, 4, 5, 6, 7, 8,"
    assert _ask(generator, COUNT, generation_kwargs={"stop_words": [" 4,"]}).text == "1, 2, 3,"
    assert _ask(generator, COUNT, generation_kwargs={"stop": "30"}).text == "1, 2, 3, 4, 5, 6, 7, 8,"
    generator.close()


def test_one_stop_word_may_be_a_string(tiny_model: str) -> None:
    generator = TurboQuantLocalChatGenerator(model=tiny_model, stop_words=" 12,")  # type: ignore[arg-type]

    assert _ask(generator, COUNT, generation_kwargs={"stop": "30"}).text == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,"
    generator.close()


def test_thinking_is_kept_apart(generator: TurboQuantLocalChatGenerator) -> None:
    reply = _ask(generator, QUESTION, generation_kwargs={"enable_thinking": True})

    assert reply._content == [ReasoningContent(f"The user asks: {QUESTION}"), TextContent(ANSWER)]
    assert 0 < reply.meta["usage"]["completion_tokens_details"]["reasoning_tokens"] < 20


def test_a_seed_repeats_a_sample(generator: TurboQuantLocalChatGenerator) -> None:
    def sample(seed: int) -> str | None:
        return _ask(generator, "Write a story.", generation_kwargs={"temperature": 1.5, "seed": seed}).text

    assert sample(1) == sample(1) != sample(2)


def test_later_prompts_get_what_a_cold_component_gives(
    generator: TurboQuantLocalChatGenerator, tiny_model: str
) -> None:
    facts = "".join(f"The code for room {n} is {n * 7919 % 90000 + 10000}. " for n in range(30))
    prompts = [
        facts + "What is the code for room 7?",
        facts + "What is the code for room 7?",  # repeated
        facts[:400] + "What is the code for room 3?",  # shorter
        facts.replace("room 2 ", "room 99 ") + "What is the code for room 99?",  # edited
        "Hello!",  # unrelated
    ]

    for prompt in prompts:
        cold = TurboQuantLocalChatGenerator(model=tiny_model)
        assert _ask(generator, prompt).text == _ask(cold, prompt).text
        cold.close()


def test_a_conversation_reuses_the_cache(generator: TurboQuantLocalChatGenerator) -> None:
    messages = [ChatMessage.from_user("My name is Ada.")]
    messages.append(_ask(generator, messages))
    messages.append(ChatMessage.from_user("What is my name?"))

    reply = _ask(generator, messages)

    assert reply.text == "Your name is Ada."
    assert reply.meta["usage"]["prompt_tokens_details"]["cached_tokens"] >= 20


def test_joined_chunks_are_the_reply(generator: TurboQuantLocalChatGenerator) -> None:
    chunks: list[StreamingChunk] = []

    reply = _ask(generator, QUESTION, streaming_callback=chunks.append, generation_kwargs={"enable_thinking": True})

    joined = _convert_streaming_chunks_to_chat_message(chunks)
    assert joined._content == reply._content
    assert {key: joined.meta[key] for key in ("finish_reason", "usage", "model")} == {
        key: reply.meta[key] for key in ("finish_reason", "usage", "model")
    }
    assert [chunk.index for chunk in chunks if chunk.start] == [0, 1]
    assert chunks[-1].meta["turboquant"] == reply.meta["turboquant"]
    assert chunks[0].component_info is not None
    assert chunks[0].component_info.type.endswith("chat_generator.TurboQuantLocalChatGenerator")


def test_chunks_come_while_tokens_are_generated(generator: TurboQuantLocalChatGenerator) -> None:
    callback = MetricsCallback()

    _ask(generator, COUNT, streaming_callback=callback)

    assert callback.last is not None
    assert callback.last.chunks > 10
    assert callback.last.ttft < callback.last.engine["total_time"]


def test_the_callback_runs_in_the_callers_thread_and_context(generator: TurboQuantLocalChatGenerator) -> None:
    request_id = contextvars.ContextVar("request_id", default="none")
    request_id.set("mine")
    seen: set[tuple[int, str]] = set()

    _ask(generator, QUESTION, streaming_callback=lambda _: seen.add((threading.get_ident(), request_id.get())))

    assert seen == {(threading.get_ident(), "mine")}


def test_a_failing_callback_stops_the_generation(generator: TurboQuantLocalChatGenerator) -> None:
    def fail(chunk: StreamingChunk) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        generator.run(COUNT, streaming_callback=fail)

    assert not any(thread.name == "turboquant-generation" for thread in threading.enumerate())
    assert _ask(generator, QUESTION).text == ANSWER


def test_a_coroutine_as_callback_is_refused_by_run(generator: TurboQuantLocalChatGenerator) -> None:
    async def callback(chunk: StreamingChunk) -> None: ...

    with pytest.raises(ValueError, match="cannot be a coroutine"):
        generator.run(QUESTION, streaming_callback=callback)


def test_a_chat_template_of_ones_own(tiny_model: str) -> None:
    template = "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant{{ '\\n' }}"
    generator = TurboQuantLocalChatGenerator(model=tiny_model, chat_template=template)

    assert _ask(generator, QUESTION).text == ANSWER
    generator.close()


def test_a_tool_parser_of_ones_own(tiny_model: str, weather: Tool) -> None:
    generator = TurboQuantLocalChatGenerator(
        model=tiny_model,
        tools=[weather],
        tool_parsing_function=lambda text: [ToolCall("get_weather", {"seen": text}, id="mine")],
    )

    reply = _ask(generator, QUESTION)

    assert reply.tool_calls == [ToolCall("get_weather", {"seen": ANSWER}, id="mine")]
    assert reply.meta["finish_reason"] == "tool_calls"
    generator.close()


def test_close_frees_and_a_later_run_loads_again(generator: TurboQuantLocalChatGenerator) -> None:
    generator.close()  # nothing is loaded yet
    _ask(generator, QUESTION)
    generator.close()

    assert generator.vram_bytes() == 0
    assert _ask(generator, QUESTION).text == ANSWER


def test_a_deep_copy_shares_weights_but_no_cache(generator: TurboQuantLocalChatGenerator) -> None:
    _ask(generator, QUESTION)

    twin = copy.deepcopy(generator)

    assert twin.vram_bytes() == 0
    assert twin.to_dict() == generator.to_dict()
    twin.warm_up()
    assert twin._engine is not None
    assert generator._engine is not None
    assert twin._engine.tokenizer is generator._engine.tokenizer
    twin.close()
    assert _ask(generator, QUESTION).text == ANSWER


def test_concurrent_threads_take_turns(generator: TurboQuantLocalChatGenerator) -> None:
    answers: dict[str, str | None] = {}

    def ask(country: str) -> None:
        answers[country] = _ask(generator, f"What is the capital of {country}?").text

    threads = [threading.Thread(target=ask, args=(country,)) for country in ("France", "Italy", "Spain")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert answers == {
        country: f"The capital of {country} is {city}."
        for country, city in (("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"))
    }


class _Recorder(tracing.Tracer):
    """Keeps the tags of every span."""

    def __init__(self) -> None:
        self.spans: list[_Span] = []
        self._current: list[_Span] = []

    @contextlib.contextmanager
    def trace(
        self, operation_name: str, tags: dict[str, Any] | None = None, parent_span: tracing.Span | None = None
    ) -> Iterator[tracing.Span]:
        span = _Span(dict(tags or {}))
        self.spans.append(span)
        self._current.append(span)
        yield span
        self._current.pop()

    def current_span(self) -> tracing.Span | None:
        return self._current[-1] if self._current else None


class _Span(tracing.Span):
    def __init__(self, tags: dict[str, Any]) -> None:
        self.tags = tags

    def set_tag(self, key: str, value: Any) -> None:
        self.tags[key] = value


@pytest.fixture
def tracer() -> Iterator[_Recorder]:
    recorder = _Recorder()
    tracing.enable_tracing(recorder)
    yield recorder
    tracing.disable_tracing()


def test_metrics_are_tags_of_the_current_span(generator: TurboQuantLocalChatGenerator, tracer: _Recorder) -> None:
    _ask(generator, QUESTION)  # no span is open

    with tracer.trace("request"):
        metrics = _ask(generator, QUESTION).meta["turboquant"]

    tags = tracer.spans[0].tags
    assert tags["haystack.turboquant_local.vram_bytes"] == metrics["vram_bytes"]
    assert tags["haystack.turboquant_local.ttft"] == metrics["ttft"]
    assert all(isinstance(value, (str, int, float)) for value in tags.values())


@pytest.mark.parametrize(
    "kv_cache", ["compact", {"preset": "compact"}, {"k_bits": 3, "v_bits": 3}], ids=["name", "preset", "fields"]
)
def test_kv_cache_is_a_name_or_fields(kv_cache: Any, tiny_model: str) -> None:
    generator = TurboQuantLocalChatGenerator(model=tiny_model, kv_cache=kv_cache)

    reply = _ask(generator, "Repeat after me: " + "the quick brown fox " * 80, generation_kwargs={"max_new_tokens": 2})

    assert (reply.meta["turboquant"]["kv_cache"]["k_bits"], reply.meta["turboquant"]["kv_cache"]["v_bits"]) == (3, 3)
    assert reply.meta["turboquant"]["compression_ratio"] > 1.5
    generator.close()
