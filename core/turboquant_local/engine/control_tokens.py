"""What a user writes reaches the model as text, even where it looks like a token that only the chat template may write.

Otherwise a message, a document or a tool's result that contains `<|im_end|>` could end its own turn and begin another.
The idea is that of `sanitize_control_tokens` in newer versions of transformers: such places are marked before the
template runs, and the marks tell them from the template's own control tokens afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Unicode has set these aside for use inside a program: they are no characters, and no text has use for them.
_BEGIN: Final = "\ufdd0"
_END: Final = "\ufdd1"
_MARK: Final = re.compile(f"[{_BEGIN}{_END}]")
_MARKED: Final = re.compile(f"{_BEGIN}([^{_BEGIN}{_END}])([^{_BEGIN}{_END}]+){_END}")


def control_tokens(tokenizer: PreTrainedTokenizerBase, templates: str) -> re.Pattern[str]:
    """Matches the tokens that a chat template writes around its messages.

    Args:
        tokenizer: Its special tokens are control tokens.
        templates: Text of the template, or of several: other added tokens are control tokens if they stand in it.
            Words and white space are none: templates are full of them.
    """
    names = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if len(token.content) > 1
        and re.search(r"[^\w\s]", token.content)
        and (token.special or token.content in templates)
    }
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def mark(value: Any, tokens: re.Pattern[str]) -> Any:
    """Put marks around every control token in a string, or in the strings that lists and mappings hold, keys too.

    Marks that a string brings along are taken out.
    """
    if isinstance(value, str):
        return tokens.sub(rf"{_BEGIN}\g<0>{_END}", _MARK.sub("", value))
    if isinstance(value, Mapping):
        return {mark(key, tokens): mark(item, tokens) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mark(item, tokens) for item in value]
    return value


def encode_marked(tokenizer: PreTrainedTokenizerBase, text: str, tokens: re.Pattern[str]) -> list[int]:
    """Token ids of a text, without the marks, and with what they stood around as ordinary text.

    A control token that is cut after its first character is none any more, whatever the tokenizer.
    """

    def encode(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])

    # A template that prints a list or a mapping as Python does escapes the marks in it.
    text = re.sub(rf"\\ufdd0({tokens.pattern})\\ufdd1", rf"{_BEGIN}\1{_END}", text)
    line_break = encode("\n")
    token_ids: list[int] = []
    for piece in filter(None, _MARK.split(_MARKED.sub(rf"{_BEGIN}\1{_BEGIN}\2{_BEGIN}", text))):
        # Many tokenizers put a space before the first word of a text; after a line break, a piece is no beginning.
        continued = encode("\n" + piece) if token_ids else []
        if continued and continued[: len(line_break)] == line_break:
            token_ids += continued[len(line_break) :]
        else:
            token_ids += encode(piece)
    return token_ids
