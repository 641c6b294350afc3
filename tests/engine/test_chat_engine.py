"""What an engine answers, counts, reuses and refuses."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from turboquant_local import engine as public
from turboquant_local.engine import (
    ChatEngine,
    ChatReply,
    GenerationOptions,
    Message,
    Tool,
    ToolCall,
    loading,
)
from turboquant_local.errors import (
    ConfigError,
    ContextLengthError,
    EmptyConversationError,
    GenerationOptionError,
    ModelLoadError,
)

MakeEngine = Callable[..., ChatEngine]

CAPITAL = [Message("user", "What is the capital of France?")]
WEATHER = Tool(
    "get_weather",
    "Get the current weather for a city",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
SHORT = GenerationOptions(max_new_tokens=24)


def same(reply: ChatReply, other: ChatReply) -> bool:
    return (reply.text, reply.token_ids, reply.finish_reason) == (other.text, other.token_ids, other.finish_reason)


def test_it_answers(engine: ChatEngine) -> None:
    reply = engine.chat(CAPITAL)
    assert reply.text == "The capital of France is Paris."
    assert reply.finish_reason == "stop"
    assert reply.tool_calls == ()
    assert reply.reasoning == ""


def test_usage_and_metrics_are_counted_from_token_ids(engine: ChatEngine) -> None:
    reply = engine.chat(CAPITAL)
    assert reply.usage.prompt_tokens == engine.count_message_tokens(CAPITAL) == reply.metrics.prompt_tokens
    # The end token counts; it is not in the text.
    assert reply.usage.completion_tokens == len(reply.token_ids) == engine.count_tokens(reply.text) + 1
    assert reply.token_ids[-1] == engine.tokenizer.eos_token_id
    metrics = reply.metrics
    assert metrics == engine.last_metrics
    assert 0 < metrics.ttft < metrics.total_time
    assert metrics.tokens_per_second == pytest.approx((len(reply.token_ids) - 1) / (metrics.total_time - metrics.ttft))
    # The last token was never fed back.
    assert metrics.cache_tokens == reply.usage.total_tokens - 1
    assert metrics.vram_bytes == engine.vram_bytes() > 0
    assert metrics.peak_device_memory is None
    assert (metrics.device, metrics.dtype) == ("cpu", "bfloat16")
    assert metrics.kv_cache["preset"] == "balanced"
    assert json.loads(json.dumps(metrics.to_dict())) == metrics.to_dict()
    assert reply.first_token_at.endswith("+00:00")


def test_seeds(make_engine: MakeEngine) -> None:
    engine = make_engine(options=GenerationOptions(temperature=1.5, max_new_tokens=20))
    before = torch.get_rng_state()
    story = [Message("user", "Tell me something about rivers.")]

    def say(**fields: object) -> str:
        return engine.chat(story, options=GenerationOptions(**fields)).text

    assert say(seed=1) == say(seed=1)
    assert len({say(seed=seed) for seed in range(4)}) > 1
    assert len({say() for _ in range(4)}) > 1
    assert (
        say(temperature=0)
        == say(do_sample=False)
        == make_engine(options=SHORT).chat(story, options=GenerationOptions(max_new_tokens=20)).text
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_samples_by_default(tmp_path: Path, make_engine: MakeEngine, model_folder: str) -> None:
    shutil.copytree(model_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.py", "lexicon.json"))
    config = {"do_sample": True, "temperature": 3.0, "top_p": 0.99, "max_length": 64, "eos_token_id": 2}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(config))
    engine = make_engine(str(tmp_path / "model"))
    options = GenerationOptions(max_new_tokens=12)
    assert len({engine.chat(CAPITAL, options=options).text for _ in range(3)}) > 1
    assert engine.chat(CAPITAL, options=GenerationOptions(do_sample=False)).text == "The capital of France is Paris."


def test_lengths(engine: ChatEngine) -> None:
    reply = engine.chat(CAPITAL, options=GenerationOptions(max_new_tokens=3))
    assert (len(reply.token_ids), reply.finish_reason) == (3, "length")
    one = engine.chat(CAPITAL, options=GenerationOptions(max_new_tokens=1))
    assert (len(one.token_ids), one.metrics.tokens_per_second) == (1, 0.0)
    assert one.token_ids == reply.token_ids[:1]


def test_a_prompt_up_to_the_end_of_the_context(engine: ChatEngine) -> None:
    empty = engine.count_message_tokens([Message("user", "")])
    room = engine.context_length - empty
    full = [Message("user", " 7" * room)]
    excess = engine.count_message_tokens(full) - engine.context_length
    fits = [Message("user", " 7" * (room - (excess + 3) // 2 - 1))]
    left = engine.context_length - engine.count_message_tokens(fits)
    assert 0 < left < 10
    reply = engine.chat(fits, options=GenerationOptions(max_new_tokens=50, extra={"min_new_tokens": left}))
    assert (len(reply.token_ids), reply.finish_reason) == (left, "length")
    with pytest.raises(ContextLengthError, match=r"the prompt has \d+ tokens, the model's context has 4096"):
        engine.chat([Message("user", " 7" * 5000)])


def test_stop_strings_across_tokens(engine: ChatEngine) -> None:
    whole = engine.chat(CAPITAL)
    reply = engine.chat(CAPITAL, options=GenerationOptions(stop=("of Fra", "nowhere")))
    assert reply.text == "The capital "
    assert reply.finish_reason == "stop"
    # It ended with the very token that completed the stop string.
    assert reply.token_ids == whole.token_ids[: len(reply.token_ids)]
    text = engine.tokenizer.decode(reply.token_ids)
    assert "of Fra" in text
    assert "of Fra" not in engine.tokenizer.decode(reply.token_ids[:-1])
    # A stop string that never comes holds nothing back at the end.
    assert engine.chat(CAPITAL, options=GenerationOptions(stop=("Paris.!",))).text == whole.text
    # The cache knows what was generated.
    assert same(engine.chat(CAPITAL), whole)


def test_tool_calls(engine: ChatEngine) -> None:
    messages = [Message("user", "What is the weather in Paris?")]
    reply = engine.chat(messages, tools=[WEATHER])
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("get_weather", {"city": "Paris"})]
    assert reply.finish_reason == "tool_calls"
    assert reply.text == ""
    answer = engine.chat(
        [
            *messages,
            Message("assistant", tool_calls=reply.tool_calls),
            Message("tool", '{"temperature": 21}', tool_call_id=reply.tool_calls[0].id, name="get_weather"),
        ],
        tools=[WEATHER],
    )
    assert "21" in answer.text
    assert answer.finish_reason == "stop"


def test_a_tool_parser_of_ones_own(make_engine: MakeEngine) -> None:
    engine = make_engine(tool_parser=lambda text: [ToolCall("shout", {"length": len(text)}, "1")])
    reply = engine.chat(CAPITAL, tools=[WEATHER])
    assert [call.name for call in reply.tool_calls] == ["shout"]


def test_reasoning_is_told_apart_and_counted(engine: ChatEngine) -> None:
    messages = [Message("user", "What is the capital of Italy?")]
    reply = engine.chat(messages, options=GenerationOptions(enable_thinking=True, max_new_tokens=120))
    assert reply.reasoning
    assert "Rome" in reply.text
    assert "think>" not in reply.text + reply.reasoning
    expected = engine.count_tokens(reply.reasoning)
    assert expected <= reply.usage.reasoning_tokens <= expected + 4
    assert engine.chat(messages).usage.reasoning_tokens == 0


def test_a_chat_template_of_ones_own(make_engine: MakeEngine) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>x\n"
    engine = make_engine(chat_template=template)
    assert engine.count_message_tokens(CAPITAL) == engine.chat(CAPITAL, options=SHORT).usage.prompt_tokens


@pytest.mark.parametrize(
    ("messages", "options", "error"),
    [
        ([], None, EmptyConversationError),
        (CAPITAL, GenerationOptions(max_new_tokens=0), GenerationOptionError),
        (CAPITAL, GenerationOptions(extra={"num_beams": 2}), GenerationOptionError),
        (CAPITAL, GenerationOptions(extra={"suppress_tokens": [3], "forced_eos_token_id": 3}), GenerationOptionError),
        ([Message("user", "word " * 5000)], None, ContextLengthError),
    ],
)
def test_broken_requests_never_reach_the_model(
    engine: ChatEngine,
    gate: Callable[..., object],
    messages: list[Message],
    options: GenerationOptions | None,
    error: type[Exception],
) -> None:
    counter = gate(engine)
    with pytest.raises(error):
        engine.chat(messages, options=options)
    with pytest.raises(error):
        list(engine.stream(messages, options=options))
    assert counter.steps == 0


def test_construction_checks_what_needs_no_model_and_loads_nothing() -> None:
    with pytest.raises(ConfigError, match="preset='balnced'"):
        ChatEngine("any", kv_cache="balnced")
    with pytest.raises(ConfigError, match="dtype='int3'"):
        ChatEngine("any", dtype="int3")
    with pytest.raises(GenerationOptionError, match="max_new_tokens=0"):
        ChatEngine("any", options=GenerationOptions(max_new_tokens=0))
    engine = ChatEngine("/no/such/folder", kv_cache={"k_bits": 3})
    assert not engine.is_loaded
    assert engine.kv_cache.k_bits == 3
    with pytest.raises(ModelLoadError, match="/no/such/folder"):
        engine.chat(CAPITAL)


def test_two_engines_share_weights_and_free_them(random_model: Callable[[str], str]) -> None:
    folder = random_model("llama")
    first, second = (ChatEngine(folder, device="cpu", kv_cache=preset) for preset in ("balanced", "uncompressed"))
    first.load()
    second.load()
    assert first._loaded is not None
    assert first._loaded is second._loaded
    weights = weakref.ref(first._loaded.model)
    first.close()
    first.close()
    assert weights() is not None
    second.chat(CAPITAL, options=SHORT)
    second.close()
    assert weights() is None
    assert not second.is_loaded
    assert second.vram_bytes() == 0


def test_an_engine_works_again_after_close_and_as_a_context(make_engine: MakeEngine) -> None:
    with make_engine() as engine:
        assert engine.is_loaded
        first = engine.chat(CAPITAL)
    assert not engine.is_loaded
    again = engine.chat(CAPITAL)
    assert same(first, again)
    assert engine.is_loaded


def test_a_forgotten_engine_gives_its_model_back(random_model: Callable[[str], str]) -> None:
    engine = ChatEngine(random_model("llama"), device="cpu")
    engine.chat(CAPITAL, options=SHORT)
    key = engine._spec.key
    assert key in loading._shared
    del engine
    gc.collect()
    assert key not in loading._shared


def test_public_names_exist_and_are_documented() -> None:
    for name in public.__all__:
        assert getattr(public, name) is not None
    assert all(getattr(ChatEngine, name).__doc__ for name in vars(ChatEngine) if not name.startswith("_"))
