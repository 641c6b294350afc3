"""What a chat model is apart from its engine: settings that are copied, pickled, configured, cached and written out."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.load import dumpd, dumps, load, loads
from langchain_core.messages import HumanMessage
from langchain_core.runnables import ConfigurableField

from langchain_turboquant_local import ChatTurboQuantLocal
from langchain_turboquant_local.settings import ChatSettings
from turboquant_local.engine import ChatEngine

FRANCE = "What is the capital of France?"
PARIS = "The capital of France is Paris."

MakeModel = Callable[..., ChatTurboQuantLocal]


def engines(model: ChatTurboQuantLocal) -> list[ChatEngine]:
    return list(model._engines._engines.values())


def test_building_loads_nothing(make_model: MakeModel) -> None:
    model = make_model()
    assert engines(model) == []
    assert model.vram_bytes() == 0
    assert model.load() is model
    assert [engine.is_loaded for engine in engines(model)] == [True]


@pytest.mark.parametrize("duplicate", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy])
def test_a_copy_has_the_settings_and_no_engine(make_model: MakeModel, duplicate: Callable[..., Any]) -> None:
    model = make_model(kv_cache={"preset": "compact"}, temperature=0.0, stop=["#"], token="hf_abc", reasoning=False)
    model.invoke(FRANCE)
    made = duplicate(model)
    assert made.asdict() == model.asdict()
    assert made.token == model.token
    assert engines(made) == []
    assert made.invoke(FRANCE).content == PARIS
    made.close()
    assert model.vram_bytes() > 0


def test_a_bound_model_can_be_pickled(make_model: MakeModel) -> None:
    bound = make_model().bind(stop=["Fr"])
    bound.invoke(FRANCE)
    assert pickle.loads(pickle.dumps(bound)).invoke(FRANCE).content == "The capital of "


@pytest.mark.filterwarnings("ignore:The function `load")  # it is in beta
def test_it_is_written_and_read_back(make_model: MakeModel) -> None:
    model = make_model(kv_cache={"k_bits": 3}, temperature=0.0, stop=["#"], seed=7, generation_kwargs={"top_h": 0.5})
    trusted: Any = {"allowed_objects": [ChatTurboQuantLocal], "valid_namespaces": ["langchain_turboquant_local"]}
    for again in (load(dumpd(model), **trusted), loads(dumps(model), **trusted)):
        assert isinstance(again, ChatTurboQuantLocal)
        assert again.asdict() == model.asdict()
        assert dumpd(again) == dumpd(model)


def test_a_secret_is_not_written(make_model: MakeModel) -> None:
    assert "hf_abc" not in dumps(make_model(token="hf_abc"))
    assert "hf_abc" not in repr(make_model(token="hf_abc"))


SETTINGS: dict[str, Any] = {
    "model": "other/model",
    "kv_cache": "compact",
    "temperature": 0.0,
    "max_tokens": 9,
    "top_p": 0.5,
    "top_k": 0,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "seed": 0,
    "stop": ["#"],
    "reasoning": False,
    "generation_kwargs": {"top_h": 0.5},
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"a": 1},
    "device": "cpu",
    "dtype": "float32",
    "revision": "main",
    "trust_remote_code": True,
    "model_kwargs": {"a": 1},
    "tokenizer_kwargs": {"a": 1},
}


def test_every_setting_that_changes_a_reply_is_in_the_cache_key() -> None:
    own = ChatSettings.__annotations__.keys() & ChatSettings.model_fields.keys()
    assert own - SETTINGS.keys() == {"token", "streaming", "api_key", "timeout", "max_retries"}
    plain = ChatTurboQuantLocal(model="some/model")
    variants = [ChatTurboQuantLocal(**{"model": "some/model", name: value}) for name, value in SETTINGS.items()]
    assert len({model._get_llm_string() for model in (plain, *variants)}) == 1 + len(SETTINGS)
    assert len({str(model.asdict()) for model in (plain, *variants)}) == 1 + len(SETTINGS)
    assert plain._get_llm_string(temperature=1) != plain._get_llm_string()


def test_cached_replies_belong_to_their_settings(make_model: MakeModel) -> None:
    cache = InMemoryCache()
    first, same, other = make_model(cache=cache), make_model(cache=cache), make_model(cache=cache, kv_cache="compact")
    assert first.invoke(FRANCE).content == same.invoke(FRANCE).content == other.invoke(FRANCE).content == PARIS
    assert engines(same) == []
    assert engines(other) != []


def test_configured_copies_keep_weights_and_cache(make_model: MakeModel) -> None:
    model = make_model()
    configurable = model.configurable_fields(
        max_tokens=ConfigurableField("max_tokens"), kv_cache=ConfigurableField("kv_cache")
    )
    conversation: list[Any] = [HumanMessage(FRANCE)]
    short = configurable.with_config(configurable={"max_tokens": 3}).invoke(conversation)
    assert short.content == "The capital of"
    (engine,) = engines(model)

    conversation += [configurable.invoke(conversation), HumanMessage("Hello")]
    answer = configurable.invoke(conversation, {"configurable": {"max_tokens": 2}})
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
    assert engines(model) == [engine]

    configurable.invoke(FRANCE, {"configurable": {"kv_cache": "compact"}})
    assert [made.kv_cache.preset for made in engines(model)] == ["balanced", "compact"]


def test_configurable_models_are_written_as_langchains_own(make_model: MakeModel) -> None:
    configurable = make_model().configurable_fields(max_tokens=ConfigurableField("max_tokens"))
    assert dumpd(configurable)["id"][-1] == "RunnableConfigurableFields"


def test_another_model_for_one_call_keeps_its_own_cache(make_model: MakeModel, tiny_model: str) -> None:
    model = make_model()
    assert model.invoke(FRANCE).content == PARIS
    again = model.invoke(FRANCE, model=f"{tiny_model}/.")  # the same folder: the same engine
    assert again.content == PARIS
    assert len(engines(model)) == 1


def test_chat_models_share_weights_but_no_cache(make_model: MakeModel) -> None:
    one, two = make_model(), make_model()
    one.invoke(FRANCE)
    two.invoke("Hello")
    assert engines(one)[0]._loaded is engines(two)[0]._loaded
    assert engines(one)[0] is not engines(two)[0]
