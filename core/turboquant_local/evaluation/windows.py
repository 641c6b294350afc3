"""A text cut into windows of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from turboquant_local.errors import EvaluationError

WINDOW_LENGTH: Final = 2048
"""Tokens of a window, where the model's context allows."""

CONTEXT: Final = 512
"""Tokens at the start of a window that are read but not scored."""


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        EvaluationError: No such file, or not text.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"text={str(path)!r}: expected a text file in UTF-8 ({error}); name another one"
        ) from error


def cut_windows(
    tokenizer: Any,
    text: str,
    length: int = WINDOW_LENGTH,
    *,
    stride: int | None = None,
    limit: int | None = None,
) -> torch.Tensor:
    """Cut a text into windows of tokens; what is left at the end is dropped.

    A tokenizer that begins every text with a special token begins every window with it.

    Args:
        tokenizer: A transformers tokenizer.
        text: The text.
        length: Tokens of a window.
        stride: Tokens from the start of one window to the next; None: they do not overlap.
        limit: Most windows.

    Returns:
        `[windows, length]` token ids.

    Raises:
        EvaluationError: The text is too short for one window.
    """
    prefix = text_prefix(tokenizer)
    body = length - len(prefix)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)
    if len(ids) < body:
        raise EvaluationError(
            f"text: it has {len(ids)} tokens, one window takes {body}; give a longer text or a smaller window length"
        )
    windows = ids.unfold(0, body, stride or body)[:limit]
    return torch.cat([windows.new_tensor(prefix).expand(len(windows), -1), windows], dim=1)


def text_prefix(tokenizer: Any) -> list[int]:
    """The special token that this tokenizer puts before a text, if any."""
    empty = list(tokenizer("").input_ids)
    return empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []
