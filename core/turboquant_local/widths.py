"""Bits of a coordinate, and those that single layers have of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from turboquant_local.errors import ConfigError

BITS: Final = (1, 2, 3, 4, 6, 8, 16)
"""Bits a coordinate can be stored in; 16 keeps the model's own dtype (the identity codec)."""

LayerBits = tuple[tuple[int, int, int], ...]
"""Layer, bits of its keys, bits of its values; by layer."""


def by_layer(layer_bits: LayerBits) -> Iterator[tuple[str, list[int]]]:
    """As JSON has them, whose keys are strings."""
    return ((str(layer), [k_bits, v_bits]) for layer, k_bits, v_bits in layer_bits)


def layer_bits(value: object) -> LayerBits:
    """Check and sort what a user may write, `{layer: (k_bits, v_bits)}`, or what a config holds.

    Raises:
        ConfigError: It is neither.
    """
    error = ConfigError(
        f"layer_bits={value!r}: expected layers, counted from 0, and for each its k_bits and v_bits, of "
        f"{', '.join(map(str, BITS[:-1]))}; as in {{5: (6, 4)}}"
    )
    if isinstance(value, Mapping):
        try:
            value = tuple((int(str(layer)), *bits) for layer, bits in value.items())
        except (TypeError, ValueError):
            raise error from None
    if not isinstance(value, tuple):
        raise error
    for entry in value:
        plain = isinstance(entry, tuple) and all(type(number) is int for number in entry)
        if not plain or len(entry) != 3 or entry[0] < 0 or not set(entry[1:]) <= set(BITS[:-1]):
            raise error
    if len({entry[0] for entry in value}) < len(value):
        raise error
    return tuple(sorted(value))
