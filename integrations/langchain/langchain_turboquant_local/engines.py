"""The engines behind a chat model: made on first use, shared with its configured copies, never copied themselves."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.configurable import RunnableConfigurableFields

from turboquant_local.config import TurboQuantConfig
from turboquant_local.engine import ChatEngine
from turboquant_local.engine.loading import ModelSpec


class EnginePool:
    """Keeps one engine for each setting that needs its own weights, cache or template.

    A pickled or deep-copied pool is empty: the copy loads again, or shares the weights that this process holds.
    """

    def __init__(self) -> None:
        self._engines: dict[Hashable, ChatEngine] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[EnginePool], tuple[()]]:
        return EnginePool, ()

    def get(self, spec: ModelSpec, kv_cache: TurboQuantConfig, chat_template: str | None) -> ChatEngine:
        """The engine of these settings; it loads its model when it is used."""
        key = (spec.key, kv_cache, chat_template)
        with self._lock:
            if key not in self._engines:
                self._engines[key] = ChatEngine(**vars(spec), kv_cache=kv_cache, chat_template=chat_template)
            return self._engines[key]

    def vram_bytes(self) -> int:
        """Bytes that the KV caches of all engines keep alive."""
        with self._lock:
            return sum(engine.vram_bytes() for engine in self._engines.values())

    def close(self) -> None:
        """Free all caches, and the weights that nobody else uses; waits for running generations."""
        with self._lock:
            engines = list(self._engines.values())
            self._engines.clear()
        for engine in engines:
            engine.close()


if TYPE_CHECKING:
    _ConfigurableFields = RunnableConfigurableFields[LanguageModelInput, AIMessage]
else:  # with its types filled in, pydantic would try to build abstract runnables
    _ConfigurableFields = RunnableConfigurableFields


class ConfigurableModel(_ConfigurableFields):
    """What `configurable_fields` returns: each call builds the model anew, and this hands its engines on.

    Without it, every configured call would load the weights again and start with an empty cache.
    """

    @classmethod
    def lc_id(cls) -> list[str]:
        """Serialised as the class of langchain-core that it behaves like."""
        return RunnableConfigurableFields.lc_id()

    def _prepare(
        self, config: RunnableConfig | None = None
    ) -> tuple[Runnable[LanguageModelInput, AIMessage], RunnableConfig]:
        model, config = super()._prepare(config)
        prepared: Any = model
        prepared._engines = self.default._engines  # type: ignore[attr-defined]
        return model, config
