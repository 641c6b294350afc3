"""A model keeps its attention, whatever a cache or a measurement sets for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Give the model its attention implementation back at the end."""
    configs = {id(config): config for config in (model.config, model.config.get_text_config(decoder=True))}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
