"""Windows of tokens from a text."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from turboquant_local.errors import EvaluationError
from turboquant_local.evaluation.windows import cut_windows, read_text


class Letters:
    """One token a letter, and a token before a text if asked for."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, add_special_tokens: bool = True, **kwargs: object) -> SimpleNamespace:
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return SimpleNamespace(input_ids=start + [ord(letter) for letter in text])


def text_of(windows: torch.Tensor) -> list[str]:
    return ["".join(map(chr, row)) for row in windows.tolist()]


def test_windows_do_not_overlap_and_the_rest_is_dropped() -> None:
    assert text_of(cut_windows(Letters(), "abcdefghijk", 3)) == ["abc", "def", "ghi"]


def test_sliding_windows() -> None:
    assert text_of(cut_windows(Letters(), "abcdefgh", 4, stride=2)) == ["abcd", "cdef", "efgh"]
    assert text_of(cut_windows(Letters(), "abcdefgh", 4, stride=2, limit=1)) == ["abcd"]


def test_every_window_begins_as_the_tokenizer_begins_a_text() -> None:
    assert text_of(cut_windows(Letters(ord("^")), "abcdef", 3)) == ["^ab", "^cd", "^ef"]
    assert text_of(cut_windows(Letters(ord("^")), "abcdef", 4, stride=2)) == ["^abc", "^cde"]


def test_a_short_text_is_refused() -> None:
    with pytest.raises(EvaluationError, match="it has 3 tokens, one window takes 8"):
        cut_windows(Letters(), "abc", 8)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="expected a text file in UTF-8"):
        read_text(tmp_path / "nowhere.txt")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\xff")
    with pytest.raises(EvaluationError, match="expected a text file in UTF-8"):
        read_text(binary)
    good = tmp_path / "good.txt"
    good.write_text("Ångström", encoding="utf-8")
    assert read_text(good) == "Ångström"
