"""Constrained decoding: a grammar decides before each token which ones may come. The only file that knows llguidance.

A grammar is compiled once for a tokenizer and kept; each reply works on a copy. Its mask is laid on the logits before
anything else looks at them, so that sampling chooses among what is allowed.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import LogitsProcessor

from turboquant_local.engine.call_formats import Thought, call_format, json_rule, write_grammar
from turboquant_local.engine.json_schema import find_fault
from turboquant_local.engine.prompt import THINK, THINK_END, opens_reasoning_when_asked
from turboquant_local.engine.reply_form import ReplyForm, plain_schema
from turboquant_local.errors import BackendError, GenerationOptionError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

_KEPT_GRAMMARS: Final = 32
"""Compiled grammars kept for one tokenizer."""

_LOWEST: Final = -1e30
"""Below any score that means something, and above -inf, which is left to what the grammar forbids."""

# What looks like a mark of the model's is never a part of a text, even where the tokenizer does not call it special.
_MARK: Final = re.compile(r"<[^<>\s]+>|\[[A-Z_/]+\]")
_POSITION: Final = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
_SOURCE: Final = re.compile(r"\n +\d+ \| .*", re.DOTALL)

# What the eight tokens behind one byte of a mask get, lowest bit first: 0 for a set bit, else -inf.
_PENALTIES: Final = torch.where((torch.arange(256)[:, None] >> torch.arange(8)) % 2 == 1, 0.0, -torch.inf)


class Constraint(LogitsProcessor):
    """Holds one reply to its grammar.

    Args:
        matcher: A fresh matcher of the grammar; it is used up.
        end_ids: Tokens that end a reply: possible only where the grammar allows an end.
    """

    def __init__(self, matcher: LLMatcher, end_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._end_ids = torch.tensor(end_ids, dtype=torch.long)
        self._penalties = _PENALTIES

    def accept(self, token_id: int) -> bool:
        """Take the token that was chosen; returns whether the reply is complete and nothing can follow.

        Raises:
            GenerationOptionError: The grammar needs more work for a token than is reasonable.
        """
        self._matcher.consume_token(token_id)
        if self._matcher.is_error():
            raise GenerationOptionError(
                f"response_format: the grammar cannot go on ({_reason(self._matcher.get_error())}); simplify the schema"
            )
        return self._matcher.is_stopped()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [1, vocab_size], -inf where the grammar forbids the token."""
        if self._matcher.is_stopped():
            return scores
        if self._penalties.device != scores.device:
            self._penalties, self._end_ids = self._penalties.to(scores.device), self._end_ids.to(scores.device)
        mask = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        penalties = self._penalties.index_select(0, mask.to(scores.device, torch.int32)).view(-1)
        size = scores.shape[-1]
        if len(penalties) < size:  # a model may have more logits than its tokenizer has tokens
            penalties = torch.nn.functional.pad(penalties, (0, size - len(penalties)), value=-torch.inf)
        penalties.index_fill_(0, self._end_ids, 0.0 if self._matcher.is_accepting() else -torch.inf)
        # What another processor ruled out may be all that the grammar allows.
        return scores.clamp_min(_LOWEST) + penalties[:size]


class _Grammars:
    """The compiled grammars of one tokenizer.

    Attributes:
        call_format: How its model writes calls.
        may_think: Whether its model may begin a reply with a thinking block that the prompt has not opened.

    Args:
        tokenizer: A tokenizer of the `tokenizers` library, with its chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = _read_tokenizer(tokenizer)
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()
        self._ids: Mapping[str, int] = tokenizer.get_added_vocab()
        template = tokenizer.chat_template
        templates = "\n".join(template.values()) if isinstance(template, dict) else template or ""
        self.call_format: Final = call_format(templates)
        # Without a switch in the template it is the model that opens a block, or does not.
        self.may_think: Final = (THINK in templates or THINK in self._ids) and not opens_reasoning_when_asked(tokenizer)
        self._lock = threading.Lock()

    def write(self, mark: str) -> str:
        """A mark as grammars write it."""
        token_id = self._ids.get(mark)
        if token_id is None or not self._tokenizer.is_special_token(token_id):
            return json.dumps(mark)
        return f"<[{token_id}]>"

    def matcher(self, grammar: str) -> LLMatcher:
        """A fresh matcher.

        Raises:
            GenerationOptionError: The grammar is too large.
        """
        llguidance = _library()
        with self._lock:
            kept = self._matchers.get(grammar)
            if kept is None:
                source = llguidance.LLMatcher.grammar_from_lark(grammar)
                kept = llguidance.LLMatcher(self._tokenizer, source, log_level=0)
                if kept.is_error():
                    raise GenerationOptionError(
                        f"response_format: no grammar can be made of it ({_reason(kept.get_error())}); "
                        "simplify the schema or offer fewer tools"
                    )
                self._matchers[grammar] = kept
            self._matchers.move_to_end(grammar)
            if len(self._matchers) > _KEPT_GRAMMARS:
                self._matchers.popitem(last=False)
            return kept.deep_copy()


_kept: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, _Grammars] = weakref.WeakKeyDictionary()
_keeping: Final = threading.Lock()


def make_constraint(
    form: ReplyForm,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_end: str,
    may_think: bool,
    end_ids: Sequence[int],
) -> Constraint:
    """What holds one reply to its form.

    Args:
        form: The form.
        tokenizer: The model's tokenizer; its chat template says how calls are written.
        prompt_end: The end of the prompt, which tells whether the reply begins inside a thinking block.
        may_think: Whether the model may open such a block itself.
        end_ids: Tokens that end a reply.

    Raises:
        BackendError: llguidance is missing or cannot read the tokenizer.
        GenerationOptionError: A schema that no grammar can express.
    """
    check_schema(form.schema, "response_format['json_schema']['schema']")
    for tool in form.tools:
        check_schema(plain_schema(tool.parameters, f"tool {tool.name!r}"), f"tool {tool.name!r}, parameters")
    with _keeping:
        grammars = _kept.get(tokenizer)
        if grammars is None:
            grammars = _kept[tokenizer] = _Grammars(tokenizer)
    thought: Thought = "none"
    if prompt_end.endswith(THINK):
        thought = "open"
    elif grammars.may_think and may_think and not prompt_end.endswith(THINK_END):
        thought = "possible"
    grammar = write_grammar(form, grammars.call_format, thought, grammars.write)
    return Constraint(grammars.matcher(grammar), end_ids)


def check_schema(schema: Any, where: str) -> None:
    """Refuse a schema that no grammar can express; None is no schema.

    Raises:
        GenerationOptionError: Names the part, as a JSON pointer, and the way out.
        BackendError: llguidance is missing.
    """
    fault = None if schema is None else _fault(json.dumps(schema))
    if fault is not None:
        pointer, reason = fault
        raise GenerationOptionError(
            f"{where}, at {pointer or 'its root'!r}: a grammar cannot express this ({reason}); change that part, or "
            "leave it out and check it when the reply is there"
        )


@lru_cache(maxsize=256)
def _fault(schema: str) -> tuple[str, str] | None:
    validate = _library().LLMatcher.validate_grammar
    from_lark = _library().LLMatcher.grammar_from_lark
    return find_fault(
        json.loads(schema), lambda part: _reason(validate(from_lark(f"start: {json_rule(part)}"), None)) or None
    )


def _reason(error: str) -> str:
    """An error of llguidance without its position and the grammar's source."""
    return " ".join(_POSITION.sub("", _SOURCE.sub("", error)).split())


def _read_tokenizer(tokenizer: PreTrainedTokenizerBase) -> LLTokenizer:
    llguidance = _library()
    try:
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        description |= {"truncation": None, "padding": None}
        for token in description["added_tokens"]:
            token["special"] = token["special"] or bool(_MARK.fullmatch(token["content"]))
        read: LLTokenizer = llguidance.LLTokenizer(json.dumps(description), eos_token=tokenizer.eos_token_id)
        return read
    except (AttributeError, ValueError, TypeError) as error:
        raise BackendError(
            f"{tokenizer.name_or_path or type(tokenizer).__name__}: constrained decoding cannot read this tokenizer "
            f"({error}); it needs one with a tokenizer.json of bytes (byte-level or byte-fallback BPE)"
        ) from error


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise BackendError(
            "response_format and tool_choice need llguidance, which is not installed: pip install llguidance"
        ) from error
    return llguidance
