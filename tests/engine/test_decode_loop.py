"""The loop over fixed buffers gives the tokens of `generate`; here its step runs as it is, on a GPU as a CUDA graph."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import DogeConfig, DogeForCausalLM, GenerationConfig, LogitsProcessorList, PreTrainedModel

from turboquant_local.cache import TurboQuantCache
from turboquant_local.engine import ChatEngine, ChatReply, GenerationOptions, Message, TextDelta
from turboquant_local.engine.decode_loop import DecodeLoop
from turboquant_local.engine.sampling import Sampling
from turboquant_local.testing import random_tokens, reachable_bytes, tiny_model

MakeEngine = Callable[..., ChatEngine]

CAPITAL = [Message("user", "What is the capital of France?")]
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "city", "schema": {"type": "object", "properties": {"capital": {"type": "string"}}}},
}
SMALL = {"sink_length": 2, "residual_length": 8, "near_length": 16}


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    return tiny_model(name)


def sampling(tokens: int, **fields: Any) -> Sampling:
    return Sampling(GenerationConfig(max_new_tokens=tokens, **fields), LogitsProcessorList(), frozenset(), ())


class Collect:
    """Reads tokens; ends the reply with the `most`-th."""

    def __init__(self, most: int) -> None:
        self.ids: list[int] = []
        self.most = most

    def __call__(self, token: int) -> bool:
        self.ids.append(token)
        return len(self.ids) == self.most


@pytest.mark.parametrize(
    ("name", "length", "fields"),
    [
        ("llama", 20, {}),
        ("llama", 300, {"repetition_penalty": 1.3}),
        ("qwen2", 300, {}),
        ("qwen3", 20, {}),
        ("qwen3-moe", 300, {}),
    ],
)
def test_the_tokens_of_generate(name: str, length: int, fields: dict[str, float]) -> None:
    """A reply that is cut off, and a second turn behind it.

    Nothing is lost in the codes here: random models choose between nearly equal tokens, and a code on a boundary that
    falls to the other side decides then. `tests/cache/test_static.py` compares codes.
    """
    model, prompt = model_of(name), random_tokens(1, length)
    theirs, ours = (TurboQuantCache(model.config, "identity", **SMALL) for _ in range(2))
    loop = DecodeLoop(capture=False)
    for most, end in ((80, 80), (60, 41)):
        expected = model.generate(
            prompt, past_key_values=theirs, max_new_tokens=end, attention_mask=torch.ones_like(prompt), **fields
        )
        settings, read = sampling(most, **fields), Collect(end)
        assert loop.refusal(model, ours, settings.config) is None
        assert loop.run(model, ours, prompt, settings, read) == "static"
        assert read.ids == expected[0, prompt.shape[1] :].tolist()
        assert ours.get_seq_length() == theirs.get_seq_length() == expected.shape[1] - 1
        assert ours.stats.attention["reference"] >= theirs.stats.attention["reference"]
        assert ours.stats.materialized == 0
        prompt = torch.cat([expected, random_tokens(1, 30, seed=1)], dim=1)


def test_room_grows_with_the_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = model_of("llama"), random_tokens(1, 30)
    cache, loop, read = TurboQuantCache(model.config, "identity", **SMALL), DecodeLoop(capture=False), Collect(120)
    monkeypatch.setattr("turboquant_local.engine.decode_loop._AHEAD", 16)
    monkeypatch.setattr("turboquant_local.engine.decode_loop._SMALLEST_ROOM", 8)
    sizes = []

    def watch(token: int) -> bool:
        sizes.append(cache.vram_bytes())
        return read(token)

    expected = model.generate(
        prompt, past_key_values=TurboQuantCache(model.config, "identity", **SMALL), max_new_tokens=120
    )
    loop.run(model, cache, prompt, sampling(120), watch)
    assert read.ids == expected[0, 30:].tolist()
    assert len(set(sizes[10:])) > 3
    assert cache.vram_bytes() == reachable_bytes(cache)


def test_a_window_longer_than_the_sample_of_statistics() -> None:
    """Nothing is packed before it is full."""
    model, prompt = model_of("llama"), random_tokens(1, 20)
    theirs, ours = (TurboQuantCache(model.config, "identity", residual_length=80) for _ in range(2))
    read = Collect(150)
    expected = model.generate(prompt, past_key_values=theirs, max_new_tokens=150)
    assert DecodeLoop(capture=False).run(model, ours, prompt, sampling(150), read) == "static"
    assert read.ids == expected[0, 20:].tolist()
    assert ours.layers[0]._k.near.length == theirs.layers[0]._k.near.length > 0


@pytest.mark.parametrize("length", [20, 300])
def test_a_model_that_reads_keys_itself_goes_on_without_buffers(length: int) -> None:
    """Doge makes its mask of the values."""
    torch.manual_seed(0)
    config = DogeConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, head_dim=16, max_position_embeddings=1024,
    )  # fmt: skip
    on_cuda = torch.cuda.is_available()
    device = "cuda" if on_cuda else "cpu"
    model, prompt = DogeForCausalLM(config).eval().to(device), random_tokens(1, length).to(device)
    theirs, ours = (TurboQuantCache(config, "identity", **SMALL) for _ in range(2))
    loop, read = DecodeLoop(capture=on_cuda), Collect(40)
    expected = model.generate(prompt, past_key_values=theirs, max_new_tokens=40)
    how = loop.run(model, ours, prompt, sampling(40), read)
    assert how.startswith("eager: DogeForCausalLM cannot decode in buffers (mask")
    assert read.ids == expected[0, length:].tolist()
    assert ours.vram_bytes() == reachable_bytes(ours) == theirs.vram_bytes()
    assert loop.refusal(model, ours, sampling(9).config) == how.removeprefix("eager: ")


def test_buffers_are_kept_counted_and_let_go() -> None:
    model, prompt = model_of("llama"), random_tokens(1, 300)
    cache, loop = TurboQuantCache(model.config), DecodeLoop(capture=False)
    loop.run(model, cache, prompt, sampling(20), Collect(20))
    held = cache.vram_bytes()
    assert held == reachable_bytes(cache) == reachable_bytes(loop._storage, cache)
    # One token needs no buffers, but those of the reply before are still there.
    fresh = TurboQuantCache(model.config)
    loop.run(model, fresh, prompt, sampling(1), Collect(1))
    assert fresh.vram_bytes() == reachable_bytes(loop._storage, fresh) > held
    loop.release(fresh)
    alone = TurboQuantCache(model.config)
    model.generate(prompt, past_key_values=alone, max_new_tokens=1)
    assert fresh.vram_bytes() == alone.vram_bytes()


def test_the_first_token_comes_before_what_its_prompt_leaves_is_packed() -> None:
    model, prompt, recent = model_of("llama"), random_tokens(1, 600), []
    cache = TurboQuantCache(model.config)

    def ends(token: int) -> bool:
        recent.append(cache.layers[0]._k.recent.shape[2])
        return True

    DecodeLoop(capture=False).run(model, cache, prompt, sampling(9), ends)
    assert recent == [600 - cache.window_start(599)] == [276]
    assert cache.layers[0]._k.recent.shape[2] < 32


def test_large_buffers_make_room_for_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turboquant_local.engine.decode_loop._KEPT", 511)
    model, prompt = model_of("llama"), random_tokens(1, 400)
    cache, loop, there = TurboQuantCache(model.config), DecodeLoop(capture=False), []
    for length in (300, 400):
        assert (
            loop.run(model, cache, prompt[:, :length], sampling(3), lambda _: there.append(loop._storage)) == "static"
        )
    assert [storage is None for storage in there] == [True, False, False] * 2
    assert loop.run(model, TurboQuantCache(model.config), prompt, sampling(1), Collect(1)) == ""


@pytest.mark.parametrize(
    ("name", "capture", "fields", "reason"),
    [
        ("llama", True, {}, "no CUDA graphs on cpu"),
        ("llama", False, {"no_repeat_ngram_size": 2}, "option no_repeat_ngram_size"),
        ("phi3", False, {}, "Phi3ForCausalLM has a prepare_inputs_for_generation of its own"),
        ("gemma3", False, {}, "layer 0 is not a compressed one (sliding window)"),
    ],
)
def test_what_is_left_to_generate(name: str, capture: bool, fields: dict[str, Any], reason: str) -> None:
    model = model_of(name)
    refusal = DecodeLoop(capture).refusal(model, TurboQuantCache(model.config), GenerationConfig(**fields))
    assert refusal == reason


def static(engine: ChatEngine) -> ChatEngine:
    engine._kept.decode_loop = DecodeLoop(capture=False)
    return engine


def told(reply: ChatReply) -> tuple[object, ...]:
    metrics = reply.metrics
    return (
        reply.text, reply.token_ids, reply.finish_reason, reply.usage,
        metrics.cache_tokens, metrics.uncompressed_bytes, metrics.materialized,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 3},
        {"stop": ("Par",)},
        {"response_format": FORMAT},
        {"max_new_tokens": 3},
        {"max_new_tokens": 1},
        {"repetition_penalty": 1.2},
    ],
    ids=lambda options: " ".join(options) or "greedy",
)
def test_an_engine_says_the_same(
    options: dict[str, Any], make_engine: MakeEngine, long_question: Callable[..., Message]
) -> None:
    """Short and long prompts, turn after turn in one cache."""
    eager, looped = make_engine(), static(make_engine())
    given = GenerationOptions(**{"max_new_tokens": 24, **options})
    conversation: list[Message] = []
    for question in (*CAPITAL, long_question("Raj Young", last=50), long_question("Uma Kelly", last=30)):
        conversation = [*conversation, question] if len(conversation) < 4 else [question]
        expected, reply = (engine.chat(conversation, options=given) for engine in (eager, looped))
        assert told(reply) == told(expected)
        assert expected.metrics.decoding == "eager: no CUDA graphs on cpu"
        assert reply.metrics.decoding in ("static", "")
        assert looped.vram_bytes() == reply.metrics.vram_bytes
        conversation.append(Message("assistant", reply.text))


def test_an_option_that_only_generate_serves(make_engine: MakeEngine) -> None:
    engine = static(make_engine())
    engine.chat(CAPITAL, options=GenerationOptions(max_new_tokens=5))
    reply = engine.chat(CAPITAL, options=GenerationOptions(max_new_tokens=5, extra={"no_repeat_ngram_size": 3}))
    assert reply.metrics.decoding == "eager: option no_repeat_ngram_size"
    assert engine._kept.decode_loop._storage is None


def test_cancelling(make_engine: MakeEngine) -> None:
    engine, cancel = static(make_engine()), threading.Event()
    texts = []
    for event in engine.stream(CAPITAL, cancel=cancel):
        if isinstance(event, TextDelta):
            texts.append(event.text)
            cancel.set()
    assert engine.last_metrics is not None
    assert 1 <= engine.last_metrics.completion_tokens < 8
    assert engine.chat(CAPITAL).text == "The capital of France is Paris."


def test_an_error_frees_everything(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = static(make_engine())
    expected = engine.chat(CAPITAL)

    def fail(*args: object) -> None:
        raise RuntimeError("no step")

    with monkeypatch.context() as patched:
        patched.setattr("turboquant_local.engine.decode_step.DecodeStep.__call__", fail)
        with pytest.raises(RuntimeError, match="no step"):
            engine.chat(CAPITAL)
    assert engine.vram_bytes() == 0
    assert engine._kept.decode_loop._storage is None
    assert engine.chat(CAPITAL).token_ids == expected.token_ids


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """A test of the graph itself."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@on_gpu
@pytest.mark.parametrize("length", [20, 300])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_graph_gives_the_tokens_of_generate(name: str, length: int) -> None:
    """Through the beginning of packing, far tokens, and a second turn in the buffers and the graph of the first."""
    model, prompt = tiny_model(name, head_dim=64).cuda(), random_tokens(1, length).cuda()
    theirs, ours = (TurboQuantCache(model.config, "identity", near_length=64) for _ in range(2))
    loop = DecodeLoop()
    for most in (200, 60):
        expected = model.generate(
            prompt, past_key_values=theirs, max_new_tokens=most, attention_mask=torch.ones_like(prompt)
        )
        settings, read = sampling(most), Collect(most)
        assert loop.refusal(model, ours, settings.config) is None
        assert loop.run(model, ours, prompt, settings, read) == "cuda graph"
        assert read.ids == expected[0, prompt.shape[1] :].tolist()
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.stats.materialized == 0
        assert set(ours.stats.attention) <= {"exact", "reference", "triton"}
        prompt = torch.cat([expected, random_tokens(1, 30, seed=1).cuda()], dim=1)


@on_gpu
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 1}, {"stop": ("5",)}], ids=str)
def test_an_engine_decodes_by_a_graph(options: dict[str, Any], model_folder: str) -> None:
    question = [Message("user", "What is the capital of France? " + "Count to nine: 1 2 3 4 5 6 7 8 9. " * 30)]
    given = GenerationOptions(max_new_tokens=48, **options)
    with ChatEngine(model_folder, device="cuda", dtype="float32") as engine:
        first, again = engine.chat(question, options=given), engine.chat(question, options=given)
        assert first.metrics.decoding == again.metrics.decoding == "cuda graph"
        assert again.metrics.vram_bytes == engine.vram_bytes() == reachable_bytes(engine._kept.cache)
        engine._kept.decode_loop.refusal = lambda *_: "told so"  # type: ignore[method-assign]
        engine.reset()
        eager = engine.chat(question, options=given)
    assert eager.metrics.decoding == "eager: told so"
    assert first.token_ids == again.token_ids == eager.token_ids
    assert first.finish_reason == ("stop" if "stop" in options else "length")


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_an_engine_on_a_device_that_is_not_the_current_one(model_folder: str) -> None:
    question = [Message("user", "What is the capital of France? " + "Count to nine: 1 2 3 4 5 6 7 8 9. " * 30)]
    replies = []
    for device in ("cuda:0", "cuda:1"):
        with ChatEngine(model_folder, device=device, dtype="float32") as engine:
            replies.append(engine.chat(question, options=GenerationOptions(max_new_tokens=48)))
    assert torch.cuda.current_device() == 0
    assert [reply.metrics.decoding for reply in replies] == ["cuda graph"] * 2
    assert replies[0].token_ids == replies[1].token_ids


@on_gpu
def test_two_threads_may_capture_at_once(model_folder: str) -> None:
    question = [Message("user", "Count to nine: 1 2 3 4 5 6 7 8 9. " * 30)]
    engines = [ChatEngine(model_folder, device="cuda", dtype="float32") for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        first, *others = pool.map(lambda e: e.chat(question, options=GenerationOptions(max_new_tokens=48)), engines)
    for engine in engines:
        engine.close()
    assert {reply.metrics.decoding for reply in (first, *others)} == {"cuda graph"}
    assert all(reply.token_ids == first.token_ids for reply in others)


@on_gpu
def test_what_cannot_be_captured_runs_as_it_is() -> None:
    model, prompt = tiny_model("llama", head_dim=64).cuda(), random_tokens(1, 300).cuda()
    expected = model.generate(prompt, past_key_values=TurboQuantCache(model.config, "identity"), max_new_tokens=20)
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x: forward(x) if x.sum().item() is not None else x  # a wait for the device
    read = Collect(20)
    how = DecodeLoop().run(model, TurboQuantCache(model.config, "identity"), prompt, sampling(20), read)
    assert how.startswith("eager: its step cannot be captured")
    assert read.ids == expected[0, 300:].tolist()
    assert torch.randn(3, device="cuda").isfinite().all()
