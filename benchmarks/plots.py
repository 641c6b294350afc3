"""Draw the plots of docs/ from benchmarks/results/, and fill the tables of GPU figures in README.md and docs/gpu.md.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->` and holds figures of the rows alone, so after new rows this
brings plots and pages up to date; a test says when it was forgotten. Needs matplotlib.

Run: python benchmarks/plots.py
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "gpu.md")
PRESETS = ("balanced", "compact", "extreme")

Row = dict[str, str]


def rows(name: str) -> list[Row]:
    """The rows of one benchmark."""
    with (ROOT / "benchmarks" / "results" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def tokens(row: Row, field: str = "context") -> str:
    """A number of tokens, in units of 1,024 where it is a multiple."""
    count = int(row[field])
    return f"{count:,}" if count % 1024 else f"{count // 1024}K"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def groups(found: Iterable[Row], *fields: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows with equal fields, in order of appearance."""
    together: dict[tuple[str, ...], list[Row]] = {}
    for row in found:
        together.setdefault(tuple(row[field] for field in fields), []).append(row)
    return together


def by(found: Iterable[Row], field: str) -> dict[str, Row]:
    """Rows by one field."""
    return {row[field]: row for row in found}


def matrix(found: Iterable[Row], field: str, cell: Callable[[Row], str]) -> tuple[list[str], list[list[str]]]:
    """Contexts for the head of a table, and a line for each value of a field."""
    parts = {name: by(part, "context") for (name,), part in groups(found, field).items()}
    contexts = sorted({context for part in parts.values() for context in part}, key=int)
    lines = [[name, *(cell(part[x]) if x in part else "" for x in contexts)] for name, part in parts.items()]
    return [tokens(next(part[x] for part in parts.values() if x in part)) for x in contexts], lines


def decode_attention(models: str = "") -> str:
    """One query token: microseconds of a call; of models whose names have these letters."""
    lines = []
    found = [row for row in rows("decode_attention") if models in row["model"]]
    for (model, batch, _), part in groups(found, "model", "batch", "context").items():
        kernels = by(part, "kernel")
        best = min((row for row in part if "ours" not in row["kernel"]), key=lambda row: float(row["us_median"]))
        ours = [kernels[f"ours {preset}"] for preset in PRESETS]
        cells = [f"{float(row['us_median']):.1f} ({float(row['speedup_over_best_16_bit']):.2f}x)" for row in ours]
        lines.append(
            [model.replace("Llama-3.1-8B, Qwen3-4B", "Llama-3.1-8B"), f"{batch} x {tokens(part[0])}",
             f"{float(best['us_median']):.1f} ({best['kernel']})", *cells]
        )  # fmt: skip
    return table(["shape", "batch x context", "best 16-bit kernel", *(f"`{name}`" for name in PRESETS)], lines)


def prefix_attention() -> str:
    """Many query tokens over a packed prefix: microseconds of a call."""
    lines = []
    for part in groups(rows("prefix_attention"), "new", "context").values():
        kernels = by(part, "kernel")
        names = ("torch flash", "torch cuDNN, no mask", "ours", "ours, reference")
        cells = [f"{float(kernels[name]['us_median']):,.0f}" if name in kernels else "" for name in names]
        lines.append([f"{int(part[0]['new']):,} over {tokens(part[0])}", *cells])
    return table(["tokens", "torch flash, bf16", "torch cuDNN, bf16, no mask", "ours", "ours, in torch"], lines)


def cell(row: Row, field: str, digits: int) -> str:
    """A figure; of a way that failed, what went wrong."""
    error, colon, _ = row.get("decoding", "").partition(":")
    return f"{float(row[field]):.{digits}f}" if row[field] else (error if colon else "")


def generate(field: str, digits: int) -> str:
    """One figure of whole generations, by way and context."""
    head, lines = matrix(rows("generate"), "way", lambda row: cell(row, field, digits))
    return table(["", *head], lines)


def summary() -> str:
    """What matters most of whole generations."""
    fastest = "StaticCache compiled, grouped cuDNN"
    columns = (
        ("ms a token", "ms_a_token", 1, ("ours balanced", "DynamicCache", "StaticCache compiled", fastest)),
        ("first token, s", "first_token_s", 2, ("ours balanced", "DynamicCache")),
        ("peak, GiB", "peak_gib", 2, ("ours balanced", "DynamicCache")),
    )
    lines = []
    for part in groups(rows("generate"), "context").values():
        ways = by(part, "way")
        cells = [
            cell(ways[way], field, digits) if way in ways else "" for _, field, digits, ws in columns for way in ws
        ]
        lines.append([tokens(part[0]), *cells])
    names = {
        "ours balanced": "{}", "DynamicCache": "`DynamicCache`", "StaticCache compiled": "`StaticCache`, compiled",
        fastest: "the same by cuDNN",
    }  # fmt: skip
    return table(["context", *(names[way].format(title) for title, _, _, ways in columns for way in ways)], lines)


def memory() -> str:
    """Peaks in GiB, and the longest context that fits the budget."""
    found = rows("memory")
    longest = {row["way"]: row for row in found if row["budget_gib"] and row["outcome"] == "fits"}
    head, lines = matrix([row for row in found if not row["budget_gib"]], "way", lambda row: cell(row, "peak_gib", 2))
    budget = next(float(row["budget_gib"]) for row in found if row["budget_gib"])
    ends = [tokens(longest[line[0]]) if line[0] in longest else "" for line in lines]
    return table(
        ["", *head, f"longest in {budget:g} GiB"], [[*line, end] for line, end in zip(lines, ends, strict=True)]
    )


def prefill() -> str:
    """The first token of one plain call, and how much longer it takes than with `DynamicCache`."""
    head, lines = matrix(rows("prefill"), "cache", lambda row: f"{cell(row, 'ttft_ms_median', 0)} ({row['ratio']})")
    return table(["ms", *head], lines)


def device() -> str:
    """Where and when."""
    row, dates = rows("generate")[-1], sorted({row["date"] for row in rows("generate")})
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "transformers"))
    return f"One {row['gpu']}, {versions}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."


TABLES: dict[str, Callable[[], str]] = {
    "device": device,
    "decode attention": decode_attention,
    "decode attention of Llama": partial(decode_attention, "Llama"),
    "prefix attention": prefix_attention,
    "prefill": prefill,
    "summary": summary,
    "ms a token": partial(generate, "ms_a_token", 1),
    "first token": partial(generate, "first_token_s", 2),
    "peak": partial(generate, "peak_gib", 2),
    "memory": memory,
}


def filled(page: str) -> str:
    """A page with the newest figures in its tables."""

    def block(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n\n{TABLES[found[1]]()}\n\n<!-- /{found[1]} -->"

    return re.sub(r"<!-- ([\w ]+) -->.*?<!-- /\1 -->", block, page, flags=re.DOTALL)


def lines(axes: Axes, found: Iterable[Row], label: str, value: str) -> None:
    """A line for each value of a field, against the context."""
    markers = cycle("os^vDP<>*X")
    for (name,), part in groups((row for row in found if row[value]), label).items():
        points = sorted((int(row["context"]), float(row[value])) for row in part)
        style = "-" if name.startswith("ours") else ":" if name.startswith("PyPI") else "--"
        axes.plot(*zip(*points, strict=True), ls=style, marker=next(markers), ms=4, label=name)
    axes.set(xlabel="context, tokens", xscale="log")
    axes.xaxis.set_major_locator(FixedLocator([2**power for power in range(10, 19)]))
    axes.xaxis.set_major_formatter(lambda count, _: f"{count / 1024:g}K")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3, which="both")


def logarithmic(axes: Axes, label: str) -> None:
    """A logarithmic axis upwards, with plain numbers."""
    axes.set(ylabel=label, yscale="log")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="y", which="minor", labelsize=7)


def draw(folder: Path) -> None:
    """All plots as SVG."""
    matplotlib.rcParams.update({"svg.hashsalt": "turboquant-local", "svg.fonttype": "path"})

    def save(figure: Figure, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (model, part) in zip(
        figure.subplots(1, 2, sharey=True),
        groups((row for row in rows("decode_attention") if row["batch"] == "1"), "model").items(),
        strict=True,
    ):
        lines(axes, [row for row in part if "ours" in row["kernel"]], "kernel", "speedup_over_best_16_bit")
        axes.axhline(1, color="black", lw=1)
        axes.set_title(model[0])
    figure.axes[0].set_ylabel("speed over the best 16-bit kernel")
    figure.axes[0].legend(fontsize=8)
    save(figure, "decode_attention")

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    lines(axes, rows("generate"), "way", "ms_a_token")
    logarithmic(axes, "ms a token")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, "ms_a_token")

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    lines(axes, rows("memory"), "way", "peak_gib")
    logarithmic(axes, "peak above the weights, GiB")
    axes.legend(fontsize=8)
    save(figure, "peak_memory")


def main() -> None:
    """Bring plots and pages up to date."""
    draw(ROOT / "docs")
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
