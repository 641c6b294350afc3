"""One attention for all that is compared, and the model's own again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from turboquant_local.cache.cache import ATTENTION_NAME


@contextmanager
def attention(model: Any, name: str = ATTENTION_NAME) -> Iterator[None]:
    """Let a model attend through a registered function for a while.

    The packed attention hands plain tensors on to transformers' SDPA, or to the model's eager attention where it caps
    its scores: in transformers 5.17 Gemma 2 under SDPA alone does not, and would be compared with another model.

    Args:
        model: The model.
        name: Name of the function.
    """
    configs = {id(config): config for config in (model.config, model.config.get_text_config(decoder=True))}
    before = {key: config._attn_implementation for key, config in configs.items()}
    model.config.get_text_config(decoder=True)._attn_implementation = name
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
