"""JSON schemas made ready for a grammar: moved into a larger schema, tidied, and searched for a part that fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote, unquote

ONE: Final = (
    "additionalProperties",
    "additionalItems",
    "unevaluatedProperties",
    "unevaluatedItems",
    "items",
    "contains",
    "propertyNames",
    "not",
    "if",
    "then",
    "else",
)
"""Keywords whose value is a schema; "items" may also be a list of them."""

MANY: Final = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
"""Keywords whose value is a list of schemas."""

NAMED: Final = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
"""Keywords whose value holds schemas by name."""

_REFERS: Final = frozenset({"$ref", "title", "description", "default"})
_INSIDE: Final = "#/$defs/root"

_COMBINED: Final = frozenset({"anyOf", "oneOf", "allOf", "$ref", "not", "if", "patternProperties", "dependentSchemas"})


def prepared(schema: Any, at: str = "#", *, may_close: bool = True) -> Any:
    """A copy of a schema, fit to stand at `at` inside another one.

    References inside the schema point to its new place. Names of schemas (`$id`) and of dialects are left out, as they
    would change what references mean; `uniqueItems: false` says nothing and goes too. An object that lists its
    properties gets no others, unless the schema says something about them or combines schemas anywhere: what is
    written then still fits the schema, and a model cannot ramble on in properties that nobody asked for.

    Args:
        schema: The whole schema; anything that is no schema is kept as it is, for the grammar to refuse.
        at: Where it will stand, as a reference.
        may_close: False keeps objects that list their properties open for others.
    """
    return _moved(schema, at, closes=may_close and not _is_combined(schema))


def pointer_ref(at: str, *names: str | int) -> str:
    """The reference `at` with more names behind it."""
    return "/".join([at, *(quote(str(name).replace("~", "~0").replace("/", "~1")) for name in names)])


def find_fault(schema: Any, compiles: Callable[[Any], str | None]) -> tuple[str, str] | None:
    """Search for the smallest part that cannot be compiled.

    Args:
        schema: A schema of plain JSON values.
        compiles: Says why a schema cannot be compiled, None if it can.

    Returns:
        The part as a JSON pointer ("" is the whole schema) and the reason; None if there is no fault.
    """
    known = next(_known_faults(schema, "#"), None)
    if known is not None:
        return known
    # An object is never closed here: that "oneOf" has one answer must hold for the schema as it was given.
    reason = compiles(prepared(schema, may_close=False))
    if reason is None:
        return None

    def reason_at(ref: str, schema: Any = schema) -> str | None:
        root = prepared(schema, _INSIDE, may_close=False)
        return compiles({"$ref": _INSIDE + ref.removeprefix("#"), "$defs": {"root": root}})

    ref, seen = "#", {"#"}
    while deeper := next(((r, why) for r in _parts(schema, ref) if r not in seen and (why := reason_at(r))), None):
        ref, reason = deeper
        seen.add(ref)
    part = _resolved(schema, ref)
    for keyword in part if isinstance(part, Mapping) else ():
        changed = copy.deepcopy(schema)
        del _resolved(changed, ref)[keyword]
        if reason_at(ref, changed) is None:
            return _pointer(ref, keyword), reason
    return _pointer(ref), reason


def subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Each schema that stands directly in this one, with the names that lead to it."""
    for keyword, value in schema.items():
        if keyword in NAMED and isinstance(value, Mapping):
            yield from (((keyword, name), nested) for name, nested in value.items())
        elif keyword in MANY and isinstance(value, list):
            yield from (((keyword, index), nested) for index, nested in enumerate(value))
        elif keyword in ONE:
            yield (keyword,), value


def _moved(schema: Any, at: str, *, closes: bool) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[keyword] = at + value[1:]
        elif keyword in NAMED and isinstance(value, Mapping):
            moved[keyword] = {name: _moved(nested, at, closes=closes) for name, nested in value.items()}
        elif keyword in MANY and isinstance(value, list):
            moved[keyword] = [_moved(nested, at, closes=closes) for nested in value]
        elif keyword in ONE:
            moved[keyword] = _moved(value, at, closes=closes)
        elif keyword not in ("$id", "$schema") and not (keyword == "uniqueItems" and value is False):
            moved[keyword] = value
    if closes and _lists_its_properties(schema):
        moved.setdefault("additionalProperties", False)
    return moved


def _lists_its_properties(schema: Mapping[str, Any]) -> bool:
    properties, required = schema.get("properties"), schema.get("required", [])
    return (
        isinstance(properties, Mapping)
        and isinstance(required, list)
        and all(name in properties for name in required)
        and not schema.keys() & {"minProperties", "unevaluatedProperties"}
    )


def _is_combined(schema: Any) -> bool:
    """Whether one value may have to fit several object schemas at once: closing one could shut out another."""
    if not isinstance(schema, Mapping):
        return False
    several = isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1
    beside = "properties" in schema and bool(schema.keys() & _COMBINED)
    return several or beside or any(_is_combined(nested) for _, nested in subschemas(schema))


def _known_faults(schema: Any, ref: str) -> Iterator[tuple[str, str]]:
    """Pointers and reasons of what compiles although it cannot be held to, or fails without telling where."""
    if not isinstance(schema, Mapping):
        return
    least, required, target = schema.get("minProperties"), schema.get("required"), schema.get("$ref")
    if isinstance(least, int) and least > max(1, len(required) if isinstance(required, list) else 0):
        yield _pointer(ref, "minProperties"), "it could write the same property twice"
    if isinstance(target, str) and not target.startswith("#"):
        yield _pointer(ref, "$ref"), f"{target!r} is outside of the schema"
    for names, nested in subschemas(schema):
        yield from _known_faults(nested, pointer_ref(ref, *names))


def _pointer(ref: str, *names: str) -> str:
    return unquote(pointer_ref(ref, *names).removeprefix("#"))


def _parts(schema: Any, ref: str) -> Iterator[str]:
    """References to the schemas that the one at `ref` is made of; definitions count where they are used."""
    part = _resolved(schema, ref)
    if not isinstance(part, Mapping):
        return
    for names, nested in subschemas(part):
        if names[0] not in ("$defs", "definitions"):
            # What only refers is looked up at once, or a fault of a recursive schema would be found where it recurs.
            target = _target(schema, nested)
            yield target if target is not None and nested.keys() <= _REFERS else pointer_ref(ref, *names)
    if (target := _target(schema, part)) is not None:
        yield target


def _target(schema: Any, part: Any) -> str | None:
    """The local reference of a part, if it leads anywhere."""
    ref = part.get("$ref") if isinstance(part, Mapping) else None
    leads = isinstance(ref, str) and ref.startswith("#") and _resolved(schema, ref) is not None
    return ref if leads else None


def _resolved(schema: Any, ref: str) -> Any:
    """What a local reference points to; None if nothing."""
    for name in ref.split("/")[1:]:
        name = unquote(name).replace("~1", "/").replace("~0", "~")
        try:
            schema = schema[int(name)] if isinstance(schema, list) else schema[name]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return schema
