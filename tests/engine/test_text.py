"""Text appears token by token, whole characters only, and ends at a stop string."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_python import PythonBackend

from turboquant_local.engine.text import StopStrings, TokenDecoder
from turboquant_local.errors import GenerationOptionError

TINY_MODEL = Path(__file__).parents[2] / "examples" / "tiny-model"
TINY: Any = AutoTokenizer.from_pretrained(TINY_MODEL)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As in Llama 2 and older Mistral models: a space before each word, unknown characters as byte tokens."""
    words = ["▁hi", "▁", "▁there", "x", "</s>", "[TOOL_CALLS]"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + at for at, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True), AddedToken("[TOOL_CALLS]", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=True)


class SlowTokenizer(PythonBackend):
    """One in Python: tokens are bytes, and the text is stripped on the left."""

    def __init__(self, **kwargs: Any) -> None:
        self._vocab = {f"{byte:02x}": byte for byte in range(256)} | {"<eos>": 256}
        super().__init__(eos_token="<eos>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return dict(self._vocab)

    def _convert_token_to_id(self, token: str) -> int:
        return self._vocab[token]

    def _convert_id_to_token(self, index: int) -> str:
        return f"{index:02x}"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return bytes.fromhex("".join(tokens)).decode(errors="replace").lstrip(" ")


BYTES: Any = byte_fallback_tokenizer()
SLOW: Any = SlowTokenizer()


def stream(tokenizer: Any, token_ids: list[int]) -> list[str]:
    decoder = TokenDecoder(tokenizer)
    return [*(decoder.push(token_id) for token_id in token_ids), decoder.flush()]


def whole(tokenizer: Any, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is Paris.",
        "  two spaces , and \t tabs\n\n at  the end \n",
        "Zürich — 東京, 👩‍👩‍👧 and 🏳️‍🌈: e\u0301 ☃",
        '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>',
        f"a real {REPLACEMENT} and one at the end {REPLACEMENT}",
        "",
    ],
)
def test_the_pieces_make_up_the_text(text: str) -> None:
    token_ids = TINY.encode(text, add_special_tokens=False)
    pieces = stream(TINY, token_ids)
    assert "".join(pieces) == text
    if text.isascii():
        assert all(pieces[:-1])  # every token shows at once


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, len(TINY) - 1), max_size=30))
def test_any_tokens_make_up_what_decode_gives(token_ids: list[int]) -> None:
    skipped = {TINY.eos_token_id, TINY.pad_token_id}
    assert "".join(stream(TINY, token_ids)) == whole(TINY, [token for token in token_ids if token not in skipped])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12))
def test_a_slow_tokenizer(text: str) -> None:
    token_ids = list(text.encode())
    pieces = stream(SLOW, [*token_ids, SLOW.eos_token_id])
    assert "".join(pieces) == text.lstrip(" ")
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


def test_half_a_character_is_held_back() -> None:
    hi, euro = BYTES.convert_tokens_to_ids("▁hi"), [0xE2, 0x82, 0xAC]
    assert stream(BYTES, [hi, *euro, hi]) == ["hi", "", "", "€", " hi", ""]
    assert stream(BYTES, [hi, *euro[:2]]) == ["hi", "", "", REPLACEMENT * 2]


def test_the_space_before_a_word_survives() -> None:
    space, hi = BYTES.convert_tokens_to_ids(["▁", "▁hi"])
    for token_ids in ([hi, hi], [hi, space, hi], [space, hi], [space, space, hi], [hi, ord("\n"), hi]):
        assert "".join(stream(BYTES, token_ids)) == whole(BYTES, token_ids)


def test_bytes_that_turn_out_to_be_invalid_do_not_take_back_what_was_shown() -> None:
    hi = BYTES.convert_tokens_to_ids("▁hi")
    token_ids = [hi, ord("\n"), 0xFF, hi, hi]
    assert whole(BYTES, token_ids) == f"hi{REPLACEMENT * 2} hi hi"
    assert stream(BYTES, token_ids) == ["hi", "\n", "", f"{REPLACEMENT} hi", " hi", ""]


def test_end_tokens_are_left_out_and_other_special_tokens_stay() -> None:
    hi, end, call = BYTES.convert_tokens_to_ids(["▁hi", "</s>", "[TOOL_CALLS]"])
    assert "".join(stream(BYTES, [hi, call, ord("["), end])) == "hi[TOOL_CALLS]["
    start, end, pad = TINY.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    assert "".join(stream(TINY, [start, end, pad])) == "<|im_start|>"
    # Their text, written in ordinary tokens, is text.
    assert "".join(stream(BYTES, [ord(character) for character in "</s>"])) == "</s>"


def test_spaces_before_punctuation_are_not_cleaned_up() -> None:
    assert "".join(stream(BYTES, [ord(character) for character in "a . b n't"])) == "a . b n't"


def feed(stop: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    stops = StopStrings(stop)
    shown = [stops.push(piece) for piece in pieces]
    return [*shown, stops.flush()], stops.stopped


@pytest.mark.parametrize(
    ("stop", "pieces", "shown", "stopped"),
    [
        (["STOP"], ["a", " ST", "OP b"], ["a", " ", "", ""], True),
        (["STOP"], ["a S", "T", "ART"], ["a ", "", "START", ""], False),
        (["STOP"], ["a STO"], ["a ", "STO"], False),
        (["STOP"], ["STOP", "more", "STOP"], ["", "", "", ""], True),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", "", ""], True),
        (["aab"], ["aaaa", "b"], ["aa", "", ""], True),
        (["bcd", "c"], ["abcd"], ["ab", ""], True),
        (["abc", "bc"], ["xabc"], ["x", ""], True),
        ([], ["a", "b"], ["a", "b", ""], False),
    ],
)
def test_stop_strings(stop: list[str], pieces: list[str], shown: list[str], stopped: bool) -> None:
    assert feed(stop, pieces) == (shown, stopped)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_stop_strings_do_not_depend_on_the_pieces(stop: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    # The first stop string to be complete ends the text; of several that end there, the longest.
    ends = [(text.find(item) + len(item), text.find(item)) for item in stop if item in text]
    expected = text[: min(ends)[1]] if ends else text
    for cut in (pieces, [text], list(text)):
        shown, stopped = feed(stop, cut)
        assert ("".join(shown), stopped) == (expected, bool(ends))


@pytest.mark.parametrize("stop", [[""], ["a", ""], "stop", [1], [None]])
def test_impossible_stop_strings_are_refused(stop: Any) -> None:
    with pytest.raises(GenerationOptionError, match="stop="):
        StopStrings(stop)
