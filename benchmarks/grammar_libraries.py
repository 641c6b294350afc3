"""Grammar libraries side by side: JSON schema keywords they hold to, and milliseconds to set up, compile and mask.

    pip install llguidance outlines-core      (xgrammar too, where its triton may be installed)
    python benchmarks/grammar_libraries.py

Whatever is installed is measured, on the tokenizer of the embedded model and on one of 32,000 tokens made here.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from vocabulary import make_tokenizer

ROOT = Path(__file__).parents[1]
TEXT = "She wrote the first program for a machine that was never built, and saw further than its inventor. "
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
        "kind": {"enum": ["author", "editor"]},
        "biography": {"type": "string"},
    },
    "required": ["name", "age", "tags", "kind", "biography"],
    "additionalProperties": False,
}
DOCUMENT = {"name": "Ada", "age": 36, "tags": ["mathematics", "poetry"], "kind": "author", "biography": TEXT * 6}
PAIR = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "null"}},
    "additionalProperties": False,
}
TREE = {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2}}}
# Keyword, schema, what fits it, what does not.
KEYWORDS: list[tuple[str, dict[str, Any], list[Any], list[Any]]] = [
    ("enum", {"enum": ["a", 1, None]}, ["a", 1, None], ["b", 2]),
    ("const", {"const": "fixed"}, ["fixed"], ["fix", 1]),
    ("optional", {**PAIR, "required": ["b"]}, [{"b": None}, {"a": 1, "b": None}], [{"a": 1}, {}]),
    ("all optional", PAIR, [{}, {"a": 1}, {"b": None}, {"a": 1, "b": None}], [{"c": 1}]),
    ("additionalProperties", {"type": "object", "additionalProperties": {"type": "null"}}, [{"x": None}], [{"x": 1}]),
    ("minItems maxItems", {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2}, [[None]], [[]]),
    ("prefixItems", {"type": "array", "prefixItems": [{"type": "null"}], "items": False}, [[None]], [[1]]),
    ("minLength maxLength", {"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "äöü"], ["a", "abcd"]),
    ("pattern", {"type": "string", "pattern": "^[a-c]{2}$"}, ["ab"], ["ad", "abc"]),
    ("pattern anywhere", {"type": "string", "pattern": "b"}, ["abc"], ["ac"]),
    ("pattern with length", {"type": "string", "pattern": "^a+$", "maxLength": 2}, ["aa"], ["aaa"]),
    ("format date", {"type": "string", "format": "date"}, ["2026-01-31"], ["2026-1-31"]),
    ("integer range", {"type": "integer", "minimum": -3, "maximum": 12}, [-3, 12], [-4, 13]),
    ("number range", {"type": "number", "exclusiveMinimum": 0, "maximum": 1.5}, [0.5, 1.5], [0, 1.6]),
    ("multipleOf", {"type": "integer", "multipleOf": 7}, [14], [15]),
    ("anyOf", {"anyOf": [{"type": "null"}, {"type": "integer"}]}, [None, 3], ["a"]),
    ("allOf", {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 3}]}, [2, 3], [1, 4]),
    ("$ref, recursive", TREE, [[], [[], [[]]]], [[[], [], []], [1]]),
    ("$ref beside others", {"$ref": "#/$defs/i", "minimum": 3, "$defs": {"i": {"type": "integer"}}}, [3], [2]),
    ("type list", {"type": ["string", "null"]}, ["a", None], [1]),
]
# Nothing here can be held to; a library that compiles it lets wrong replies through.
IMPOSSIBLE: list[dict[str, Any]] = [
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    {"type": "array", "contains": {"type": "null"}},
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"type": "integer", "not": {"const": 3}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"if": {"type": "integer"}, "then": {"minimum": 3}},
]


class Matcher(Protocol):
    """One walk through a grammar."""

    def mask(self) -> object:
        """Compute which tokens may come."""

    def accept(self, token: int) -> bool:
        """Take a token; returns whether the grammar allows it."""

    def is_complete(self) -> bool:
        """Whether the text may end here."""


Library = Callable[[Any], Callable[[dict[str, Any]], Callable[[], Matcher]]]


def llguidance(tokenizer: Any) -> Callable[[dict[str, Any]], Callable[[], Matcher]]:
    """As the engine uses it."""
    from llguidance import LLMatcher, LLTokenizer

    read = LLTokenizer(tokenizer.backend_tokenizer.to_str(), eos_token=tokenizer.eos_token_id)
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

    class Walk:
        def __init__(self, matcher: Any) -> None:
            self.mask = matcher.compute_bitmask
            self.accept = matcher.consume_token
            self.is_complete = matcher.is_accepting

    def compile_schema(schema: dict[str, Any]) -> Callable[[], Matcher]:
        grammar = LLMatcher.grammar_from_lark(f"start: %json {json.dumps({**schema, 'x-guidance': style})}")
        matcher = LLMatcher(read, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return lambda: Walk(matcher.deep_copy())

    return compile_schema


def xgrammar(tokenizer: Any) -> Callable[[dict[str, Any]], Callable[[], Matcher]]:
    """With the same spaces as the others."""
    import xgrammar as xg

    info = xg.TokenizerInfo.from_huggingface(tokenizer)
    compiler = xg.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    bits = xg.allocate_token_bitmask(1, info.vocab_size)

    class Walk:
        def __init__(self, compiled: Any) -> None:
            matcher = xg.GrammarMatcher(compiled, terminate_without_stop_token=False)
            self.mask = lambda: matcher.fill_next_token_bitmask(bits)
            self.accept = matcher.accept_token
            self.is_complete = lambda: matcher.accept_token(tokenizer.eos_token_id)

    def compile_schema(schema: dict[str, Any]) -> Callable[[], Matcher]:
        compiled = compiler.compile_json_schema(schema, any_whitespace=False, separators=(", ", ": "))
        return lambda: Walk(compiled)

    return compile_schema


def outlines_core(tokenizer: Any) -> Callable[[dict[str, Any]], Callable[[], Matcher]]:
    """Schemas become regular expressions there, and those an index of all tokens in all states."""
    from outlines_core import Guide, Index, Vocabulary
    from outlines_core.json_schema import build_regex_from_schema

    end = tokenizer.eos_token_id
    raw = {character: byte for byte, character in bytes_to_unicode().items()}
    tokens: dict[bytes, list[int]] = {}
    for token, number in tokenizer.get_vocab().items():
        if number != end and number not in tokenizer.added_tokens_decoder:
            tokens.setdefault(bytes(raw[character] for character in token), []).append(number)
    vocabulary = Vocabulary(end, tokens)
    words = (len(tokenizer) + 31) // 32
    bits = torch.zeros(words, dtype=torch.int32)

    class Walk:
        def __init__(self, index: Any) -> None:
            self.guide = Guide(index)

        def mask(self) -> object:
            return self.guide.write_mask_into(bits.data_ptr(), words, 4)

        def accept(self, token: int) -> bool:
            try:
                self.guide.advance(token, return_tokens=False)
            except ValueError:
                return False
            return True

        def is_complete(self) -> bool:
            return end in self.guide.get_tokens()

    def compile_schema(schema: dict[str, Any]) -> Callable[[], Matcher]:
        index = Index(build_regex_from_schema(json.dumps(schema), r"[ ]?"), vocabulary)
        return lambda: Walk(index)

    return compile_schema


def fits(start: Callable[[], Matcher], tokenizer: Any, document: Any) -> bool:
    """Whether the grammar lets a document through."""
    matcher = start()
    tokens = tokenizer(json.dumps(document, ensure_ascii=False), add_special_tokens=False)["input_ids"]
    return all(matcher.accept(token) for token in tokens) and matcher.is_complete()


def coverage(
    compile_schema: Callable[[dict[str, Any]], Callable[[], Matcher]], tokenizer: Any
) -> tuple[list[str], int]:
    """Keywords that are not held to, and how many impossible schemas are refused."""
    failed = []
    for keyword, schema, good, bad in KEYWORDS:
        try:
            start = compile_schema(schema)
            held = all(fits(start, tokenizer, document) for document in good)
            held = held and not any(fits(start, tokenizer, document) for document in bad)
        except Exception:  # each library has errors of its own
            held = False
        failed += [] if held else [keyword]
    refused = 0
    for schema in IMPOSSIBLE:
        try:
            compile_schema(schema)
        except Exception:
            refused += 1
    return failed, refused


def times(compile_schema: Callable[[dict[str, Any]], Callable[[], Matcher]], tokenizer: Any) -> list[float]:
    """Milliseconds to compile `SCHEMA`, and microseconds of a mask and its token: median, 99 of 100, worst."""
    compiled = []
    for _ in range(3):
        start = time.perf_counter()
        begin = compile_schema(SCHEMA)
        compiled.append(1000 * (time.perf_counter() - start))
    tokens = tokenizer(json.dumps(DOCUMENT), add_special_tokens=False)["input_ids"]
    steps = []
    for _ in range(5):
        matcher = begin()
        for token in tokens:
            start = time.perf_counter()
            matcher.mask()
            allowed = matcher.accept(token)
            steps.append(1e6 * (time.perf_counter() - start))
            assert allowed
    cuts = statistics.quantiles(steps, n=100, method="inclusive")
    return [statistics.median(compiled), cuts[49], cuts[98], max(steps)]


def main() -> None:
    """Measure what is installed and print it."""
    console = Console(width=120)
    tokenizers = {
        "4,096": AutoTokenizer.from_pretrained(ROOT / "examples/tiny-model"),
        "32,000": make_tokenizer(32_000),
    }
    view = Table(title="milliseconds to set up and compile; microseconds a token; keywords held to; impossible refused")
    for column in ("library", "vocabulary", "set up", "compile", "p50", "p99", "worst", "keywords", "refused"):
        view.add_column(column, justify="left" if column == "library" else "right")
    for build in (llguidance, xgrammar, outlines_core):
        name = build.__name__.replace("_", "-")
        for size, tokenizer in tokenizers.items():
            start = time.perf_counter()
            try:
                compile_schema = build(tokenizer)
            except ImportError:
                console.print(f"{name}: not installed")
                break
            prepared = 1000 * (time.perf_counter() - start)
            figures = [f"{value:,.0f}" for value in (prepared, *times(compile_schema, tokenizer))]
            failed, refused = coverage(compile_schema, tokenizer)
            held = f"{len(KEYWORDS) - len(failed)} of {len(KEYWORDS)}"
            version = importlib.metadata.version(name)
            view.add_row(f"{name} {version}", size, *figures, held, f"{refused} of {len(IMPOSSIBLE)}")
        else:
            console.print(f"{name} does not hold to: {', '.join(failed) or 'nothing'}")
    console.print(view)


if __name__ == "__main__":
    main()
