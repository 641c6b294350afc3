"""The settings of a chat model, and what follows from them alone; nothing here loads anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Self, cast

from langchain_core.language_models import LangSmithParams, ModelProfile
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.utils import secret_from_env
from pydantic import ConfigDict, Field, SecretStr, field_validator, model_validator

from langchain_turboquant_local.options import check_options, generation_options
from langchain_turboquant_local.profile import model_profile
from langchain_turboquant_local.streaming import PROVIDER
from turboquant_local import TurboQuantConfig, __version__
from turboquant_local.config import plain_settings
from turboquant_local.engine import GenerationOptions
from turboquant_local.engine.loading import ModelSpec
from turboquant_local.errors import ConfigError, did_you_mean

_NOT_IN_OUTPUT: Final = frozenset({"token", "api_key", "timeout", "max_retries", "streaming"})
"""Fields that change nothing in a reply."""


class ChatSettings(BaseChatModel):
    """Fields of `ChatTurboQuantLocal`, checked when it is built, and their names for LangChain's traces and caches."""

    model: str
    """Name on the Hugging Face hub, or a folder."""

    kv_cache: dict[str, Any] | str | None = None
    """How keys and values are stored: a preset's name, a dict of fields, or a `TurboQuantConfig`; None: "balanced"."""

    temperature: float | None = None
    """Above 0 samples, 0 is greedy; None means the model's own generation config, as in the fields below."""

    max_tokens: int | None = None
    """Most tokens of a reply; None means what the model says, else 512."""

    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    seed: int | None = None
    """Makes sampling repeatable."""

    stop: list[str] | None = None
    """Strings that end a reply and are left out of it. Those of a call replace them."""

    reasoning: bool | None = None
    """Let a model think that can, or not; None leaves it to the chat template. Thoughts never stand in the text."""

    generation_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Other fields of transformers' `GenerationConfig`."""

    chat_template: str | None = None
    """A Jinja template instead of the tokenizer's own."""

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template."""

    device: str | None = None
    """A torch device; None takes cuda, else mps, else cpu."""

    dtype: str | None = None
    """Such as "bfloat16"; None means the model's own."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    token: SecretStr | None = Field(default_factory=secret_from_env(["HF_TOKEN", "HF_API_TOKEN"], default=None))
    """Access token of the hub; read from HF_TOKEN or HF_API_TOKEN if not given."""

    trust_remote_code: bool = False
    """Run code that comes with the model."""

    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to `AutoModelForCausalLM.from_pretrained`."""

    tokenizer_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to `AutoTokenizer.from_pretrained`."""

    streaming: bool = False
    """Stream inside `invoke` too, as LangChain does for callbacks that ask for it."""

    api_key: SecretStr | None = Field(default=None, exclude=True)
    """Taken because every chat model takes it, and not used: nothing is sent anywhere."""

    timeout: float | None = Field(default=None, exclude=True)
    """As `api_key`."""

    max_retries: int | None = Field(default=None, exclude=True)
    """As `api_key`."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_turboquant_local_settings(cls, values: Any) -> Any:
        for name in values if isinstance(values, Mapping) else ():
            if name not in cls.model_fields:
                hint = did_you_mean(name, cls.model_fields, "did you mean {!r}? ")
                raise ConfigError(
                    f"{name}: no such setting; {hint}help(langchain_turboquant_local) names them; other fields of "
                    "transformers' GenerationConfig go into generation_kwargs"
                )
        return values

    @field_validator("kv_cache", mode="before")
    @classmethod
    def _plain_kv_cache(cls, value: object) -> object:
        return plain_settings(cast(Any, value))

    @field_validator("stop", mode="before")
    @classmethod
    def _listed_stop(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_turboquant_local_settings(self) -> Self:
        self._spec(self.model)
        check_options(self._default_options())
        self._add_version("turboquant-local", __version__)
        return self

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """All settings are plain values."""
        return True

    @property
    def lc_secrets(self) -> dict[str, str]:
        """Fields that are read from the environment instead of being written out."""
        return {"token": "HF_TOKEN"}

    @property
    def _llm_type(self) -> str:
        return "turboquant-local"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        own = ChatSettings.__annotations__.keys() & ChatSettings.model_fields.keys() - _NOT_IN_OUTPUT
        params = {name: getattr(self, name) for name in sorted(own)}
        return params | {"kv_cache": TurboQuantConfig.parse(self.kv_cache).to_dict()}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = PROVIDER
        return params

    def _resolve_model_profile(self) -> ModelProfile | None:
        return model_profile(self.model, revision=self.revision, chat_template=self.chat_template)

    def _default_options(self) -> GenerationOptions:
        return dataclasses.replace(
            generation_options(dict(self), stop=self.stop),
            template_kwargs=self.chat_template_kwargs,
            extra=self.generation_kwargs,
        )

    def _spec(self, model: str) -> ModelSpec:
        return ModelSpec(
            model=model,
            device=self.device,
            dtype=self.dtype,
            revision=self.revision,
            token=self.token.get_secret_value() if self.token is not None else None,
            trust_remote_code=self.trust_remote_code,
            model_kwargs=self.model_kwargs,
            tokenizer_kwargs=self.tokenizer_kwargs,
        )
