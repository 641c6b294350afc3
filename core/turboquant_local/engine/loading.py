"""Models and tokenizers, loaded once per process and shared by all engines that ask for the same."""

from __future__ import annotations

import copy
import gc
import logging
import threading
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from turboquant_local.engine.model_files import check_model_files, explain_load_error, resolve_model
from turboquant_local.errors import BackendError, ConfigError, ModelLoadError

logger = logging.getLogger(__name__)

DTYPES: Final = ("auto", "float32", "float16", "bfloat16")
"""Names of dtypes that a model can be loaded in; "auto" is the one it was saved in."""


_FOR_BOTH: Final = ("revision", "token", "trust_remote_code")
"""What the tokenizer needs as well as the model, so that it has a field of its own."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything that decides which weights and which tokenizer are loaded.

    Attributes:
        model: A folder or a name on the Hugging Face hub.
        device: A torch device; None takes cuda, else mps, else cpu.
        dtype: One of `DTYPES`; None means what `model_kwargs` says, else "auto".
        revision: Branch, tag or commit on the hub.
        token: Access token of the hub.
        trust_remote_code: Run code that comes with the model.
        model_kwargs: Passed to `AutoModelForCausalLM.from_pretrained`.
        tokenizer_kwargs: Passed to `AutoTokenizer.from_pretrained`.

    Raises:
        ConfigError: An unknown dtype, a device that torch cannot read, or something in `model_kwargs` or
            `tokenizer_kwargs` that has a field of its own.
    """

    model: str
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model.strip():
            raise ConfigError(f"model={self.model!r}: expected a folder or a name such as 'Qwen/Qwen3-0.6B'")
        for field_name in ("model_kwargs", "tokenizer_kwargs"):
            for name in getattr(self, field_name).keys() & set(_FOR_BOTH):
                raise ConfigError(
                    f"{field_name}[{name!r}]: model and tokenizer must have the same; give it beside {field_name}, as "
                    f"{name}"
                )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if self.dtype is not None and self.model_kwargs.keys() & {"dtype", "torch_dtype"}:
            raise ConfigError(f"dtype={self.dtype!r}: model_kwargs has one too; keep one of them")
        if self.device is not None:
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError) as error:
                raise ConfigError(
                    f"device={self.device!r}: expected a torch device such as 'cuda', 'cuda:1', 'mps' or 'cpu'"
                ) from error

    @property
    def key(self) -> Hashable:
        """Equal for specs that load the same."""
        resolved = {
            "model": resolve_model(self.model),
            "device": self.device or default_device(),
            "dtype": self.dtype or ("auto" if "dtype" not in self.model_kwargs else None),
        }
        return _frozen({**vars(self), **resolved})


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to generate, with its tokenizer.

    Attributes:
        model: The model, in evaluation mode. Its own generation config is blank: `defaults` holds it.
        tokenizer: The tokenizer.
        defaults: The model's generation config.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    defaults: GenerationConfig

    @property
    def device(self) -> torch.device:
        """Where inputs go and logits come out."""
        return torch.device(self.model.device)

    @property
    def context_length(self) -> int:
        """Most tokens that prompt and reply may have together."""
        length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(length or self.tokenizer.model_max_length)


@dataclass
class _Shared:
    users: int = 0
    loaded: LoadedModel | None = None


_shared: dict[Hashable, _Shared] = {}
# Reentrant: a forgotten engine gives its model back from the garbage collector, which may run under this very lock.
_registry = threading.RLock()
# Loading sets process-wide state in torch and transformers (the default dtype), so one model is loaded at a time.
# Nothing else is done under this lock, generation least of all.
_loading = threading.Lock()


def acquire_model(spec: ModelSpec) -> LoadedModel:
    """Load the model of `spec`, or share it if it is loaded already. Each call needs one `release_model`.

    Raises:
        ModelLoadError: Files or weights are missing, unreadable or out of reach.
        BackendError: The device does not exist here.
    """
    key = spec.key
    with _registry:
        shared = _shared.get(key) or _Shared()
        shared.users += 1
        _shared[key] = shared
    try:
        if shared.loaded is None:
            with _loading:
                if shared.loaded is None:
                    shared.loaded = _load(spec)
    except BaseException:
        release_model(key)
        raise
    return shared.loaded


def release_model(key: Hashable) -> None:
    """Give one use of a model back, by its spec's key; with the last one the weights are freed."""
    with _registry:
        shared = _shared[key]
        shared.users -= 1
        if shared.users:
            return
        del _shared[key]
    shared.loaded = None
    # Modules refer to each other in cycles: only a collection frees the weights now.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def default_device() -> str:
    """Name of the best device that is here: cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    _log_no_gpu()
    return "cpu"


@cache
def _log_no_gpu() -> None:
    logger.warning("no GPU is visible to torch: models run on the CPU")


def _load(spec: ModelSpec) -> LoadedModel:
    check_model_files(spec.model, model_kwargs=spec.model_kwargs)
    source = resolve_model(spec.model)
    device = spec.device or default_device()
    check_device(device)
    hub: dict[str, Any] = {
        "revision": spec.revision,
        "token": spec.token or None,  # an HF_TOKEN that is set but empty is none; sent, the hub refuses it
        "trust_remote_code": spec.trust_remote_code,
    }
    model_kwargs = dict(spec.model_kwargs)
    if spec.dtype is not None or "dtype" not in model_kwargs:
        model_kwargs["dtype"] = spec.dtype or "auto"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **_given(hub), **spec.tokenizer_kwargs)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, **_given(hub), **model_kwargs, output_loading_info=True
        )
        model, info = loaded
        if "device_map" not in model_kwargs:
            model = model.to(device)
    except Exception as error:
        raise ModelLoadError(explain_load_error(spec.model, error)) from error
    _check_weights(spec.model, model, info["missing_keys"])
    defaults = copy.deepcopy(model.generation_config)
    # `generate` fills gaps of the config it is given from the model's own, and warns where they do not fit. Ours is
    # complete, so the model keeps none.
    model.generation_config = GenerationConfig()
    return LoadedModel(model.eval(), tokenizer, defaults)


def _check_weights(name: str, model: Any, missing: Iterable[str]) -> None:
    """Refuse random numbers in place of weights; of quantized ones transformers makes some itself."""
    lacking = sorted(set(missing) & {weight for weight, _ in model.named_parameters()})
    if lacking and not getattr(model, "is_quantized", False):
        raise ModelLoadError(
            f"model={name!r}: the checkpoint lacks {len(lacking)} of the weights of {type(model).__name__}, such as "
            f"{lacking[0]}, which would be random numbers; expected a whole checkpoint of a model that generates text"
        )


def check_device(device: str) -> None:
    """Refuse a device that is not here.

    Raises:
        BackendError: torch sees no such device.
    """
    kind = torch.device(device)
    here = {
        "cuda": torch.cuda.is_available() and (kind.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not here.get(kind.type, True):
        raise BackendError(
            f"device={device!r}: torch {torch.__version__} sees no such device; use 'cpu', or None for the best one"
        )


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _frozen(value: Any) -> Hashable:
    """A hashable stand-in that is equal for equal settings; an unhashable object stands for itself alone."""
    if isinstance(value, Mapping):
        return frozenset((str(name), _frozen(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return (type(value), value)
