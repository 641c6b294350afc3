"""`kv_cache="auto"` on a LangChain chat model."""

from collections.abc import Callable

from langchain_turboquant_local import ChatTurboQuantLocal


def test_it_is_kept_as_written_and_reported_as_chosen(make_model: Callable[..., ChatTurboQuantLocal]) -> None:
    model = make_model(kv_cache={"preset": "auto"}, max_tokens=2)
    assert model._identifying_params["kv_cache"] == {"preset": "auto"}
    reply = model.invoke("Hello")
    assert reply.response_metadata["turboquant"]["kv_cache"]["preset"] == "balanced"
    assert model.kv_cache == {"preset": "auto"}
