"""Every error that turboquant-local raises on purpose.

Each message names the argument, what was expected, what came and the way out.

::

    TurboQuantError
    ├── ConfigError (ValueError)             a setting that does not exist or does not fit
    ├── BackendError (RuntimeError)          an implementation was asked for that cannot run here
    ├── EvaluationError (ValueError)         a measurement that these inputs do not allow
    ├── CacheError (RuntimeError)            a cache used with another model, or in a way it cannot serve
    ├── ModelError (RuntimeError)            a model that cannot be loaded or cannot chat
    │   ├── ModelLoadError                   missing or unreadable files or weights
    │   └── ChatTemplateError                no chat template, or one that refuses these messages
    └── PromptError (ValueError)             a request that cannot be served
        ├── EmptyConversationError           no message to answer
        ├── ContextLengthError               more tokens than the model's context
        ├── ToolSchemaError                  a tool whose JSON schema is broken
        └── GenerationOptionError            an unknown or impossible generation option
"""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: object, known: Iterable[str], form: str = " (did you mean {!r}?)") -> str:
    """A hint at the known name that is closest, in the words of `form`; "" if none is close."""
    match = get_close_matches(str(name), list(known), n=1)
    return form.format(match[0]) if match else ""


class TurboQuantError(Exception):
    """Base of all errors of this package; its text is meant to be shown to the user."""


class ConfigError(TurboQuantError, ValueError):
    """A setting that does not exist or does not fit the others."""


class BackendError(TurboQuantError, RuntimeError):
    """An implementation was asked for by name and cannot run here."""


class EvaluationError(TurboQuantError, ValueError):
    """A measurement that these inputs do not allow."""


class CacheError(TurboQuantError, RuntimeError):
    """A cache is used with a model it was not built for, or in a way that it cannot serve."""


class ModelError(TurboQuantError, RuntimeError):
    """A model that cannot be used."""


class ModelLoadError(ModelError):
    """Files or weights of a model or tokenizer are missing or cannot be read."""


class ChatTemplateError(ModelError):
    """The tokenizer has no chat template, or the template refuses the messages."""


class PromptError(TurboQuantError, ValueError):
    """A request that cannot be served as it stands."""


class EmptyConversationError(PromptError):
    """There is no message to answer."""


class ContextLengthError(PromptError):
    """The prompt has more tokens than the model's context."""


class ToolSchemaError(PromptError):
    """A tool whose name or JSON schema is broken."""


class GenerationOptionError(PromptError):
    """A generation option that is unknown or cannot be honoured."""
