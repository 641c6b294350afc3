"""Every pipeline in pipelines/ runs unchanged from the root of the repository, before and after a round trip."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from haystack import Document, Pipeline
from haystack.dataclasses import ChatMessage
from haystack.document_stores.in_memory import InMemoryDocumentStore

from haystack_integrations.components.generators.turboquant_local import MetricsCallback

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "pipelines").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(params=["as written", "round trip"])
def load(request: pytest.FixtureRequest) -> Iterator[Any]:
    loaded: list[Pipeline] = []

    def load(name: str) -> Pipeline:
        pipeline = Pipeline.loads((ROOT / "pipelines" / name).read_text())
        if request.param == "round trip":
            pipeline = Pipeline.loads(pipeline.dumps())
        loaded.append(pipeline)
        return pipeline

    yield load
    for pipeline in loaded:
        pipeline.close()


def test_each_pipeline_has_a_test() -> None:
    assert [path.name for path in FILES] == ["agent_with_tools.yaml", "chat.yaml", "long_document_qa.yaml", "rag.yaml"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_comments_tell_how_to_run_it(path: Path) -> None:
    head = path.read_text().split("components:")[0]

    assert f'Pipeline.loads(Path("pipelines/{path.name}").read_text())' in head
    assert "Hugging Face hub" in head
    assert set(yaml.safe_load(path.read_text())) <= {"components", "connections"}


def test_chat(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = load("chat.yaml")

    result = pipeline.run({"prompt": {"question": "What is the capital of France?"}})

    metrics = pipeline.get_component("llm").streaming_callback
    assert result["llm"]["replies"][0].text == "The capital of France is Paris."
    assert "The capital of France is Paris." in capsys.readouterr().out
    assert isinstance(metrics, MetricsCallback)
    assert metrics.summary().startswith("first chunk after ")


async def test_chat_streams_asynchronously(load: Any) -> None:
    handle = load("chat.yaml").stream({"prompt": {"question": "What is the capital of France?"}})

    assert "".join([chunk.content async for chunk in handle]) == "The capital of France is Paris."


def test_rag(load: Any) -> None:
    pipeline = load("rag.yaml")
    pipeline.get_component("retriever").document_store.write_documents(
        [
            Document(content="Ada Moreno lives in Lisbon."),
            Document(content="Tom Reyes works as a baker."),
            Document(content="Ada Keller lives in Prague."),
        ]
    )

    def ask(question: str) -> str:
        result = pipeline.run({"retriever": {"query": question}, "prompt": {"question": question}})
        text: str = result["llm"]["replies"][0].text
        return text

    assert ask("Where does Ada Moreno live?") == "Ada Moreno lives in Lisbon."
    assert ask("What does Tom Reyes do for work?") == "Tom Reyes works as a baker."


def test_long_document_qa(load: Any, tmp_path: Path) -> None:
    sentences = [f"In the year {1500 + n} the harvest was good and the winter was mild." for n in range(64)]
    sentences.insert(20, "The pass key is 48213. Remember it. 48213 is the pass key.")
    document = tmp_path / "chronicle.txt"
    document.write_text(" ".join(sentences))
    pipeline = load("long_document_qa.yaml")

    def ask(question: str) -> ChatMessage:
        result = pipeline.run({"file": {"sources": [str(document)]}, "prompt": {"question": question}})
        reply: ChatMessage = result["llm"]["replies"][0]
        return reply

    first = ask("What is the pass key?")
    second = ask("Tell me the pass key.")

    assert first.text is not None
    assert "48213" in first.text
    assert second.text is not None
    assert "48213" in second.text
    assert first.meta["turboquant"]["compression_ratio"] > 2.5
    assert first.meta["turboquant"]["materialized"] == 0
    usage = second.meta["usage"]
    computed = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    assert computed < 350  # near codes and recent window, 256 to 319 tokens, and what is new


def test_agent_with_tools(load: Any) -> None:
    store = InMemoryDocumentStore(index="turboquant-local-catalogue")
    store.write_documents(
        [
            Document(content="blue kettle", meta={"name": "blue kettle", "price": 25}),
            Document(content="red lamp", meta={"name": "red lamp", "price": 40}),
        ]
    )
    pipeline = load("agent_with_tools.yaml")

    result = pipeline.run({"agent": {"messages": [ChatMessage.from_user("Search for the blue kettle.")]}})["agent"]

    assert result["tool_call_counts"] == {"search": 1}
    assert result["last_message"].text == "The name is blue kettle and price is 25."
    store.delete_documents([document.id for document in store.filter_documents()])
