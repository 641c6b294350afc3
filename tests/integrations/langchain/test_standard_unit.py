"""LangChain's standard unit tests."""

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.unit_tests import ChatModelUnitTests
from syrupy.assertion import SnapshotAssertion
from syrupy.filters import props

from langchain_turboquant_local import ChatTurboQuantLocal


class TestChatTurboQuantLocal(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[ChatTurboQuantLocal]:
        return ChatTurboQuantLocal

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "Qwen/Qwen3-0.6B"}  # nothing is loaded

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"HF_TOKEN": "hf_abc"}, self.chat_model_params, {"token": "hf_abc"}

    @pytest.fixture
    def snapshot(self, snapshot: SnapshotAssertion) -> SnapshotAssertion:
        # langchain-core 1.4 writes these fields although they are not set.
        return snapshot.with_defaults(exclude=props("output_version", "token"))

    @pytest.mark.xfail(
        reason="load() with allowed_objects='all' knows only classes of a map inside langchain-core, and none from "
        "elsewhere; test_state.py shows the round trip with allowed_objects=[ChatTurboQuantLocal]",
        raises=ValueError,
        strict=True,
    )
    def test_serdes(self, model: BaseChatModel, snapshot: SnapshotAssertion) -> None:
        super().test_serdes(model, snapshot)
