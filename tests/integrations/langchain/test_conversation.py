"""A long conversation reuses its cache and loses nothing by it."""

from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, trim_messages
from langchain_core.outputs import ChatGenerationChunk

from langchain_turboquant_local import ChatTurboQuantLocal, chat_models
from langchain_turboquant_local.streaming import ChunkWriter
from turboquant_local.engine import Finished, StreamEvent

TURNS = (
    "Remember the number 48213.",
    "What is the capital of France?",
    "What day comes after Monday?",
    "What is the opposite of hot?",
    "Which continent is Japan in?",
    "List three fruits.",
    "What is 3 + 4?",
    "Which number did I tell you?",
)

MakeModel = Callable[..., ChatTurboQuantLocal]


def talk(model: ChatTurboQuantLocal, *, cold: bool) -> list[AIMessage]:
    """The answers to all turns; cold forgets the cache before each."""
    conversation: list[BaseMessage] = []
    answers: list[AIMessage] = []
    for turn in TURNS:
        if cold:
            model.close()
        conversation.append(HumanMessage(turn))
        answers.append(model.invoke(conversation))
        conversation.append(answers[-1])
    return answers


def cached(answer: AIMessage) -> int:
    assert answer.usage_metadata is not None
    return answer.usage_metadata["input_token_details"]["cache_read"]


@pytest.fixture
def token_ids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The ids of each reply, noted where the engine hands the finished reply over; no message carries them."""
    replies: list[tuple[int, ...]] = []

    class Noting(ChunkWriter):
        def write(self, event: StreamEvent) -> ChatGenerationChunk:
            if isinstance(event, Finished):
                replies.append(event.reply.token_ids)
            return super().write(event)

    monkeypatch.setattr(chat_models, "ChunkWriter", Noting)
    return replies


@pytest.mark.parametrize("kv_cache", ["identity", "balanced"])
def test_eight_turns_equal_cold_runs_and_find_the_needle(
    make_model: MakeModel, token_ids: list[tuple[int, ...]], kv_cache: str
) -> None:
    model = make_model(kv_cache=kv_cache)
    warm, cold = talk(model, cold=False), talk(model, cold=True)
    warm_ids, cold_ids = token_ids[: len(TURNS)], token_ids[len(TURNS) :]
    assert warm_ids == cold_ids
    assert "48213" in warm[-1].text
    reused = [cached(answer) for answer in warm]
    assert reused[0] == 0
    assert all(reused[1:])
    assert reused == sorted(reused)
    assert not any(cached(answer) for answer in cold)
    # The last turns look back at packed tokens, which a cold run reads exactly: equal is what loses nothing.
    metrics = warm[-1].response_metadata["turboquant"]
    assert (metrics["compression_ratio"] > 1) == (kv_cache == "balanced")
    for answer, ids in zip(warm, warm_ids, strict=True):
        assert answer.usage_metadata is not None
        assert answer.usage_metadata["output_tokens"] == len(ids)


async def test_it_does_so_streamed_and_with_blocks(make_model: MakeModel) -> None:
    model = make_model(output_version="v1")
    conversation: list[Any] = [HumanMessage(TURNS[0])]
    full: Any = None
    async for chunk in model.astream(conversation):
        full = chunk if full is None else full + chunk
    answer = await model.ainvoke([*conversation, full, HumanMessage(TURNS[-1])])
    assert "48213" in answer.text
    assert cached(answer) > 0


def test_trimming_counts_real_tokens(model: ChatTurboQuantLocal) -> None:
    conversation = [message for turn in TURNS for message in (HumanMessage(turn), AIMessage("Yes."))]
    kept = trim_messages(conversation, max_tokens=60, token_counter=model, start_on="human", strategy="last")
    assert 0 < len(kept) < len(conversation)
    assert model.get_num_tokens_from_messages(kept) <= 60
