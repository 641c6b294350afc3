"""The kept cache: what it saves, and that nobody can tell from the answers."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from turboquant_local.engine import (
    ChatEngine,
    ChatReply,
    GenerationOptions,
    Message,
    prompt_cache,
)
from turboquant_local.engine.decode_loop import DecodeLoop

MakeEngine = Callable[..., ChatEngine]
Ask = Callable[..., Message]

CAPITAL = [Message("user", "What is the capital of France?")]
SHORT = GenerationOptions(max_new_tokens=24)


def same(reply: ChatReply, other: ChatReply) -> bool:
    return (reply.text, reply.token_ids, reply.finish_reason) == (other.text, other.token_ids, other.finish_reason)


def test_a_long_prompt_is_really_compressed(engine: ChatEngine, long_question: Ask) -> None:
    metrics = engine.chat([long_question("Kevin Young")], options=SHORT).metrics
    assert metrics.compression_ratio == pytest.approx(metrics.uncompressed_bytes / metrics.vram_bytes)
    assert metrics.compression_ratio > 2
    assert metrics.materialized == 0
    assert sum(metrics.attention.values()) > 0
    assert metrics.packing.keys() == {"reference"}
    assert metrics.packing["reference"] >= 4  # near and far, keys and values; layers of one codec together


@pytest.mark.parametrize("kv_cache", ["identity", "uncompressed"])
@pytest.mark.parametrize("name", ["tiny-model", "llama"])
def test_greedy_equals_plain_generate(
    make_engine: MakeEngine,
    random_model: Callable[[str], str],
    model_folder: str,
    long_question: Ask,
    kv_cache: str,
    name: str,
) -> None:
    folder = model_folder if name == "tiny-model" else random_model(name)
    engine = make_engine(folder, kv_cache=kv_cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for messages in ([long_question("Uma Kelly")], CAPITAL):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": messages[0].content}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        cache = DynamicCache(config=model.config)
        plain = model.generate(prompt, past_key_values=cache, do_sample=False, max_new_tokens=40, eos_token_id=[2, 0])
        reply = engine.chat(messages, options=GenerationOptions(max_new_tokens=40, extra={"eos_token_id": [2, 0]}))
        assert reply.token_ids == tuple(plain[0, prompt.shape[1] :].tolist())


@pytest.mark.parametrize("kv_cache", [None, "extreme", "paper", "uncompressed"])
def test_a_repeated_prompt_repeats_its_reply(make_engine: MakeEngine, long_question: Ask, kv_cache: str | None) -> None:
    engine = make_engine(kv_cache=kv_cache)
    for messages, least in (([long_question("Chen Wilson")], 300), (CAPITAL, 0)):
        first, second = (engine.chat(messages, options=SHORT) for _ in range(2))
        assert same(first, second)
        assert second.usage.cached_tokens >= least


def test_other_prompts_after_a_long_one_are_answered_as_by_a_fresh_engine(
    make_engine: MakeEngine, long_question: Ask
) -> None:
    engine = make_engine()
    prompts = {
        "long": [long_question("Raj Reed")],
        "edited at the end": [long_question("Simon Reed")],
        "shorter": [long_question("Logan Brown", last=30)],
        "short": CAPITAL,
        "unrelated": [Message("user", "Hello")],
        "longer again": [long_question("Raj Reed")],
    }
    for name, messages in prompts.items():
        warm = engine.chat(messages, options=SHORT)
        assert same(warm, make_engine().chat(messages, options=SHORT)), name
        if name == "edited at the end":
            assert warm.usage.cached_tokens > 300


def test_a_conversation_computes_only_its_new_tokens(make_engine: MakeEngine, long_question: Ask) -> None:
    engine = make_engine()
    messages = [long_question("Uma Brown")]
    for turn, question in enumerate(("And the value of Chen Kelly?", "What is the capital of France?", "Hello")):
        reply = engine.chat(messages, options=SHORT)
        cold = make_engine().chat(messages, options=SHORT)
        assert same(reply, cold)
        assert cold.usage.cached_tokens == 0
        if turn:
            # Everything but the new question, and the few tokens of the template around it.
            assert reply.usage.prompt_tokens - reply.usage.cached_tokens < engine.count_tokens(question) + 40
        messages += [Message("assistant", reply.text), Message("user", question)]


@pytest.mark.parametrize("name", ["gemma3", "mistral", "qwen3.5"])
def test_sliding_windows_and_recurrent_layers(
    make_engine: MakeEngine, random_model: Callable[[str], str], long_question: Ask, name: str
) -> None:
    engine = make_engine(random_model(name), kv_cache="identity")
    messages = [long_question("Raj Reed", last=20)]
    for _ in range(2):
        first = engine.chat(messages, options=SHORT)
        assert same(first, make_engine(random_model(name), kv_cache="identity").chat(messages, options=SHORT))
        messages = [*messages, Message("assistant", "I know."), Message("user", "Then say it.")]
    assert set(first.metrics.bypassed_layers.values()) <= {"sliding window", "linear attention"}
    assert first.metrics.bypassed_layers


@pytest.mark.parametrize(("name", "half", "capture"), [("llama", 32, True), ("llama", 32, False), ("phi3", 48, True)])
def test_a_rotation_that_changes_with_the_length(
    make_engine: MakeEngine, random_model: Callable[..., str], long_question: Ask, name: str, half: int, capture: bool
) -> None:
    """Keys rotated for up to 512 tokens are of no use to a longer prompt, nor the other way round."""
    factors = {"short_factor": [1.0] * half, "long_factor": [4.0] * half, "original_max_position_embeddings": 512}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    folder = random_model(name, rope_parameters=rope, original_max_position_embeddings=512)
    engine = make_engine(folder, kv_cache="identity")
    engine._kept.decode_loop = DecodeLoop(capture)  # on the CPU the second way is that of a GPU
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    cached = []
    for last, more in ((20, False), (20, True), (40, False), (40, False), (60, False), (10, True), (20, False)):
        if not more:
            messages = []
        messages += [long_question("Uma Kelly", last=last)]
        prompt = engine._render(engine._load(), messages, (), SHORT)
        plain = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=[2, 0])
        reply = engine.chat(messages, options=dataclasses.replace(SHORT, extra={"eos_token_id": [2, 0]}))
        assert reply.token_ids == tuple(plain[0, len(prompt) :].tolist())
        is_ours = reply.metrics.cache_tokens == len(prompt) + reply.usage.completion_tokens - 1
        assert is_ours != ("cache of its own" in reply.metrics.decoding)
        assert is_ours or name == "phi3"  # whose own code drops the cache there
        cached.append(reply.usage.cached_tokens > 0)
        messages.append(Message("assistant", reply.text))
    assert cached == [False, False, False, False, name == "llama", True, False]


def test_a_recurrent_model_that_forgets(
    make_engine: MakeEngine, tmp_path: Path, model_folder: str, long_question: Ask
) -> None:
    """Jamba begins anew with each forward of several tokens: it must see every prompt as a whole."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 9, "expert_layer_offset": 8}
    torch.manual_seed(0)
    config = AutoConfig.for_model("jamba", vocab_size=4096, num_key_value_heads=2, mamba_d_state=8, **sizes, **layers)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model_folder) / file, tmp_path)
    engine, messages = make_engine(str(tmp_path), kv_cache="identity"), []
    for _ in range(2):
        messages.append(long_question("Uma Kelly", last=25))
        prompt = engine._render(engine._load(), messages, (), SHORT)
        plain = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=[2, 0])
        reply = engine.chat(messages, options=dataclasses.replace(SHORT, extra={"eos_token_id": [2, 0]}))
        assert reply.token_ids == tuple(plain[0, len(prompt) :].tolist())
        messages.append(Message("assistant", reply.text))


def test_turns_in_and_out_of_inference_mode(make_engine: MakeEngine) -> None:
    """The buffers are written to in place, which torch refuses for a tensor of inference mode outside of it."""
    engine = make_engine()
    engine._kept.decode_loop = DecodeLoop(capture=False)
    with torch.inference_mode():
        engine.chat(CAPITAL, options=SHORT)
    assert engine._kept.decode_loop._storage is not None
    assert engine.chat(CAPITAL, options=SHORT).metrics.decoding == "static"


def test_another_default_device(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine._kept.decode_loop = DecodeLoop(capture=False)
    with torch.device("meta"):  # nothing can be read of what is made there
        assert engine.chat(CAPITAL).text == "The capital of France is Paris."


def test_layers_that_stay_uncompressed_are_mentioned_once(
    make_engine: MakeEngine, random_model: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    prompt_cache.log_once.cache_clear()
    for kv_cache in ("balanced", "compact", "uncompressed"):
        make_engine(random_model("gemma3"), kv_cache=kv_cache).chat(CAPITAL, options=SHORT)
    messages = [record.message for record in caplog.records if record.name.startswith("turboquant_local")]
    assert messages == ["gemma3_text: 2 of 4 layers keep an uncompressed cache: 0 (sliding window), 2 (sliding window)"]


def test_an_error_inside_the_model_leaves_no_broken_cache(
    engine: ChatEngine, gate: Callable[..., object], long_question: Ask
) -> None:
    messages = [long_question("Noah Young")]
    expected = engine.chat(messages, options=SHORT)
    assert engine._loaded is not None

    def fail(*args: object) -> None:
        raise RuntimeError("the device fell over")

    hook = engine._loaded.model.model.layers[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="fell over"):
        engine.chat([*messages, Message("assistant", "?"), Message("user", "Hello")], options=SHORT)
    hook.remove()
    assert engine.vram_bytes() == 0
    again = engine.chat(messages, options=SHORT)
    assert same(again, expected)
    assert again.usage.cached_tokens == 0


def test_reset_drops_the_cache(engine: ChatEngine) -> None:
    assert engine.vram_bytes() == 0
    engine.chat(CAPITAL)
    assert engine.vram_bytes() > 0
    engine.reset()
    assert engine.vram_bytes() == 0
