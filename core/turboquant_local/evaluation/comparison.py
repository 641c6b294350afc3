"""Many codecs on the same tokens, each with its bytes."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch

from turboquant_local.evaluation.codecs.base import KVCodec
from turboquant_local.evaluation.codecs.quantized_cache import TransformersQuantizedCache
from turboquant_local.evaluation.fidelity import CHUNK, UNCOMPRESSED, Fidelity, measure_fidelity
from turboquant_local.evaluation.windows import CONTEXT

TOKENS: Final = 4096
"""Length of the sequence whose bytes are compared."""


@dataclass(frozen=True)
class Size:
    """What a codec stores for one sequence of a 16-bit model.

    Attributes:
        bits_per_coordinate: Bits of every further token a coordinate: codes, scales, and layers left uncompressed.
        stored_bytes: All bytes at `TOKENS` tokens: also sinks, recent window and constants.
        compression: Bytes of transformers' own cache over `stored_bytes`.
    """

    bits_per_coordinate: float
    stored_bytes: int
    compression: float


@dataclass(frozen=True)
class Comparison:
    """One codec among others.

    Attributes:
        codec: Its name.
        size: What it stores.
        fidelity: What it loses; None where it could not run.
        skipped: Why it could not run.
    """

    codec: str
    size: Size
    fidelity: Fidelity | None
    skipped: str | None = None


def size(codec: KVCodec, model_config: Any) -> Size:
    """The bytes of a codec for a model.

    Raises:
        ConfigError: The model has recurrent states or layers whose size does not follow from its config.
        EvaluationError: The model's layers differ in shape.
    """
    stored, plain = (which.stored_bytes(model_config, TOKENS) for which in (codec, UNCOMPRESSED))
    # Twice the length, so that what grew is whole blocks.
    grown, plain_grown = (which.stored_bytes(model_config, 2 * TOKENS) for which in (codec, UNCOMPRESSED))
    return Size(16 * (grown - stored) / (plain_grown - plain), stored, plain / stored)


def compare(
    model: Any,
    windows: torch.Tensor,
    codecs: Sequence[KVCodec],
    *,
    context: int = CONTEXT,
    chunk: int = CHUNK,
    batch_size: int = 1,
    on_progress: Callable[[str], None] | None = None,
) -> list[Comparison]:
    """Measure codecs on the same windows; see `measure_fidelity` for the arguments.

    A codec whose package is not installed, or that packs nothing of so short a window, gives a row that says so.
    """
    sizes = {codec.name: size(codec, model.config) for codec in codecs}
    skipped = {
        codec.name: why
        for codec in codecs
        if (why := _obstacle(codec, windows.shape[1], sizes[codec.name])) is not None
    }
    present = [codec for codec in codecs if codec.name not in skipped]
    found = measure_fidelity(
        model, windows, present, context=context, chunk=chunk, batch_size=batch_size, on_progress=on_progress
    )
    fidelity = {result.codec: result for result in found}
    return [
        Comparison(codec.name, sizes[codec.name], fidelity.get(codec.name), skipped.get(codec.name)) for codec in codecs
    ]


def _obstacle(codec: KVCodec, length: int, held: Size) -> str | None:
    if isinstance(codec, TransformersQuantizedCache) and (reason := codec.missing()) is not None:
        return reason
    if held.compression > 1 and codec.seen(length - 1) == codec.seen(1):  # its figures would be perfect
        return f"windows of {length} tokens end before it packs any"
    return None


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points, bytes and loss, that none beats in both; by bytes."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def loss_at(stored_bytes: int, points: Sequence[tuple[int, float]]) -> float | None:
    """What a family of codecs loses at a given number of bytes: log-linear between its best members around it.

    Members that another beats in bytes and in loss are left out. Above the largest, its loss holds; within 1 % below
    the smallest, its own; below that there is none.

    Args:
        stored_bytes: The bytes.
        points: Bytes and loss of the members, each above 0.
    """
    best = frontier(points)
    if not best or stored_bytes < 0.99 * best[0][0]:
        return None
    for (low, loss_low), (high, loss_high) in pairwise(best):
        if low <= stored_bytes < high:
            share = math.log(stored_bytes / low) / math.log(high / low)
            return math.exp((1 - share) * math.log(loss_low) + share * math.log(loss_high))
    return best[0][1] if stored_bytes < best[0][0] else best[-1][1]


def write_csv(
    path: Path,
    rows: Sequence[Comparison],
    conditions: Mapping[str, str],
    more: Mapping[str, Mapping[str, object]] | None = None,
) -> None:
    """One line a codec: the conditions, its size, its figures.

    Args:
        path: The file; its folder is made.
        rows: The codecs.
        conditions: What the figures depend on; see `environment`.
        more: Further columns: a value for each codec that has one.
    """
    extra = more or {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        figures = [field.name for field in dataclasses.fields(Fidelity) if field.name not in ("codec", _INTERVAL)]
        sizes = [field.name for field in dataclasses.fields(Size)]
        writer.writerow(
            [*conditions, "codec", *sizes, *figures, "perplexity_low", "perplexity_high", *extra, "skipped"]
        )
        for row in rows:
            values: list[object] = [""] * (len(figures) + 2)
            if row.fidelity is not None:
                values = [getattr(row.fidelity, name) for name in figures]
                values += row.fidelity.perplexity_interval or ("", "")
            values += [column.get(row.codec, "") for column in extra.values()]
            cells = [*dataclasses.astuple(row.size), *values, row.skipped or ""]
            writer.writerow([*conditions.values(), row.codec, *(_cell(cell) for cell in cells)])


_INTERVAL: Final = "perplexity_interval"


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
