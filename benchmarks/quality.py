"""What each codec costs a model: predictions, retrieval and tool calls against bytes, in one table, with its targets.

    make quality
    make quality ARGS="--windows 3 --samples 0 --tool-samples 0 --out build/quality.csv"
    make quality ARGS="--windows 3 --samples 0 --tool-samples 0 --out build/quality.csv --codecs balanced kivi-3"
    make quality ARGS="--device cuda --batch-size 43 --samples 20 --jobs 4"

On a CPU the whole table takes hours: a codec about 5 s a window of 2048 tokens on one core of an AMD EPYC; on four
H200 it took four minutes. Steer by the mean KL divergence: perplexity is noisier (its 95 % interval stands beside it).
Rows go to benchmarks/results/quality.csv, retrieval by length and depth to quality_retrieval.csv beside it.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from turboquant_local.engine.loading import LoadedModel
from turboquant_local.evaluation import cut_windows, read_text
from turboquant_local.evaluation.codecs.registry import find_codec
from turboquant_local.evaluation.comparison import TOKENS, Comparison, compare, loss_at, write_csv
from turboquant_local.evaluation.environment import environment
from turboquant_local.evaluation.fidelity import UNCOMPRESSED
from turboquant_local.evaluation.models import load_model
from turboquant_local.evaluation.retrieval import (
    DEPTHS,
    LENGTHS,
    TASKS,
    RetrievalCell,
    Task,
    accuracy,
    measure_retrieval,
)
from turboquant_local.evaluation.tool_calls import ToolCallScore, measure_tool_calls

ROOT = Path(__file__).parents[1]
PRESETS = ("balanced", "compact", "extreme", "paper")
OURS = ("turboquant_k8v4", "balanced", "compact", "extreme", "ours-2")
"""Points of our own curve, against which others are held at equal bytes."""

BITS = (4, 3, 2)
OTHERS = ("hadamard-int", "kivi", "tile-scaling", "plain-turboquant", "turboquant-prod")
MIXED = ("turboquant-mixed-3.5", "turboquant-mixed-2.5")
PACKAGES = ("quanto-4", "quanto-2", "hqq-4")
CODECS = (
    *("identity", *OURS, "turboquant_k3v4_nc", "paper", "fp8"),
    *(f"{other}-{bits}" for bits in BITS for other in OTHERS),
    *MIXED,
    *PACKAGES,
)


@dataclass(frozen=True)
class Target:
    """What a preset promises.

    Attributes:
        compression: Least compression at `TOKENS` tokens.
        kl_mean: Greatest mean KL divergence.
        kl_median: Greatest median, if promised.
        perplexity: Greatest relative change of perplexity.
        retrieval: Least accuracy relative to the uncompressed cache.
    """

    compression: float
    kl_mean: float
    perplexity: float
    retrieval: float
    kl_median: float | None = None


TARGETS = {
    "balanced": Target(3.7, 0.0005, 0.002, 1.0, kl_median=0.00015),
    "compact": Target(4.7, 0.0016, 0.004, 0.995),
    "extreme": Target(6.0, 0.005, 0.01, 0.98),
}
ADVANTAGE = {4: 1.0, 3: 1.0, 2: 1.5}
"""How many times the loss of ours another codec of so many bits must have, at its own bytes."""


class Counter:
    """Steps done, on stderr."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done, self.start = what, total, 0, time.perf_counter()

    def __call__(self, name: str) -> None:
        """One step more."""
        self.done += 1
        seconds = time.perf_counter() - self.start
        end = "\n" if self.done == self.total else ""
        print(
            f"\r{self.what} {self.done}/{self.total}, {seconds:.0f} s, {name:40s}", end=end, file=sys.stderr, flush=True
        )


def print_table(rows: list[Comparison], cells: list[RetrievalCell], tools: list[ToolCallScore]) -> None:
    """One line a codec."""
    called = {score.codec: score for score in tools}
    print(
        f"{'codec':36s} {'bits':>6s} {'ratio':>6s} {'KL mean':>8s} {'median':>8s} {'99.9 %':>8s} {'top-1':>7s} "
        f"{'perplexity and 95 % interval':>28s} {'retrieval':>9s} {'tools':>6s}"
    )
    for row in rows:
        print(f"{row.codec:36s} {row.size.bits_per_coordinate:6.3f} {row.size.compression:6.2f}", end=" ")
        if row.fidelity is None:
            print(row.skipped)
            continue
        found = row.fidelity
        interval = found.perplexity_interval
        bounds = "" if interval is None else f"[{interval[0]:+.2%} {interval[1]:+.2%}]"
        relative = relative_retrieval(cells, row.codec)
        score = called.get(row.codec)
        print(
            f"{found.kl_mean:8.5f} {found.kl_median:8.5f} {found.kl_tail:8.4f} {found.top1_agreement:7.2%} "
            f"{found.perplexity_change:+9.2%} {bounds:>18s} {'' if relative is None else f'{relative:.1%}':>9s} "
            f"{'' if score is None else f'{score.correct}/{score.total}':>6s}"
        )


def relative_retrieval(cells: list[RetrievalCell], codec: str) -> float | None:
    """Accuracy over that of the uncompressed cache; None where it was not measured."""
    if not any(cell.codec == codec for cell in cells):
        return None
    return accuracy(cells, codec) / accuracy(cells, UNCOMPRESSED.name)


def print_retrieval(cells: list[RetrievalCell]) -> None:
    """Accuracy by task and length, all depths, and the depth where it is lowest."""
    names = list(dict.fromkeys(cell.codec for cell in cells))
    columns = list(dict.fromkeys((cell.task, cell.length) for cell in cells))
    print(
        "\nretrieval, % correct (all depths)\n" + " " * 36,
        *(f"{task[:4]}@{length}".rjust(9) for task, length in columns),
    )
    for name in names:
        shares = [accuracy([cell for cell in cells if (cell.task, cell.length) == column], name) for column in columns]
        print(f"{name:36s}", *(f"{share:9.1%}" for share in shares))


def print_targets(rows: list[Comparison], cells: list[RetrievalCell]) -> None:
    """Each promise, kept or not."""
    print("\ntargets")
    by_name = {row.codec: row for row in rows}
    for name, target in TARGETS.items():
        row = by_name.get(name)
        if row is None or row.fidelity is None:
            continue
        found, relative = row.fidelity, relative_retrieval(cells, name)
        report(name, f"compression at {TOKENS}", row.size.compression, target.compression, at_least=True)
        report(name, "mean KL", found.kl_mean, target.kl_mean)
        if target.kl_median is not None:
            report(name, "median KL", found.kl_median, target.kl_median)
        report(name, "perplexity", found.perplexity_change, target.perplexity)
        if relative is not None:
            report(name, "retrieval", relative, target.retrieval, at_least=True)
    ours = [row for name in OURS if (row := by_name.get(name)) and row.fidelity is not None]
    for name, row in by_name.items():
        family, _, bits = name.rpartition("-")
        if family not in (*OTHERS, "quanto", "hqq") or row.fidelity is None:
            continue
        for figure in ("kl_mean", "kl_tail"):
            points = [(own.size.stored_bytes, getattr(own.fidelity, figure)) for own in ours]
            loss = loss_at(row.size.stored_bytes, points)
            if loss is None:
                print(f"  -       {name}: smaller than anything of ours here")
                break
            ratio = getattr(row.fidelity, figure) / loss
            report(name, f"{figure} over ours at its bytes", ratio, ADVANTAGE[int(bits)], at_least=True)


def report(name: str, what: str, value: float, target: float, at_least: bool = False) -> None:
    """One line: kept or missed."""
    kept = value >= target if at_least else value <= target
    print(f"  {'ok' if kept else 'MISSED':7s} {name}: {what} {value:.4g}, {'>=' if at_least else '<='} {target:g}")


def write_retrieval(path: Path, cells: list[RetrievalCell], conditions: dict[str, str]) -> None:
    """One line a codec, task, length and depth."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*conditions, *(field.name for field in dataclasses.fields(RetrievalCell))])
        writer.writerows([*conditions.values(), *dataclasses.astuple(cell)] for cell in cells)


@dataclass(frozen=True)
class Job:
    """A part of the work: predictions of some codecs, or retrieval or tool calls of one.

    Attributes:
        kind: "fidelity", "retrieval" or "tools".
        codecs: Names of the codecs.
        task: The kind of prompt, for retrieval.
    """

    kind: str
    codecs: tuple[str, ...]
    task: Task = "passkey"


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Everything to do. The reference is computed once a job, so predictions go several codecs a job."""
    size = -(-len(options.codecs) // options.jobs)
    jobs = [
        Job("fidelity", tuple(options.codecs[start : start + size])) for start in range(0, len(options.codecs), size)
    ]
    tasked = (UNCOMPRESSED.name, *options.task_codecs)
    if options.samples:
        jobs += [Job("retrieval", (name,), task) for name in tasked for task in TASKS]
    if options.tool_samples:
        jobs += [Job("tools", (name,)) for name in tasked]
    return jobs


@lru_cache(maxsize=1)
def model_of(name: str, device: str, dtype: str) -> LoadedModel:
    """The model, once a process."""
    logging.disable_progress_bar()
    return load_model(name, device=device, dtype=dtype)


def work(job: Job, options: argparse.Namespace) -> list[Any]:
    """Do one job."""
    loaded = model_of(options.model, options.device, options.dtype)
    codecs = [UNCOMPRESSED if name == UNCOMPRESSED.name else find_codec(name) for name in job.codecs]
    text = read_text(options.text)
    if job.kind == "retrieval":
        return measure_retrieval(
            loaded,
            text,
            codecs,
            tasks=[job.task],
            lengths=options.lengths,
            depths=options.depths,
            samples=options.samples,
        )
    if job.kind == "tools":
        return measure_tool_calls(loaded, codecs, samples=options.tool_samples)
    windows = cut_windows(loaded.tokenizer, text, options.window, stride=options.stride, limit=options.windows)
    return compare(
        loaded.model, windows, codecs, context=options.context, chunk=options.chunk, batch_size=options.batch_size
    )


def take_gpu(taken: Any) -> None:
    """Give this process a GPU of its own, as far as there are so many."""
    with taken.get_lock():
        index, taken.value = taken.value, taken.value + 1
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(index % torch.cuda.device_count())


def measure(options: argparse.Namespace) -> tuple[list[Comparison], list[RetrievalCell], list[ToolCallScore]]:
    """Do all jobs, in one process or several."""
    jobs, found = jobs_of(options), {}
    count = Counter("jobs", len(jobs))
    if options.jobs == 1:
        for job in jobs:
            found[job] = work(job, options)
            count(" ".join((job.kind, *job.codecs)))
    else:
        spawn = get_context("spawn")
        with ProcessPoolExecutor(options.jobs, spawn, initializer=take_gpu, initargs=(spawn.Value("i", 0),)) as pool:
            running = {pool.submit(work, job, options): job for job in jobs}
            for future in as_completed(running):
                found[running[future]] = future.result()
                count(" ".join((running[future].kind, *running[future].codecs)))
    results: dict[str, list[Any]] = {"fidelity": [], "retrieval": [], "tools": []}
    for job in jobs:
        results[job.kind] += found[job]
    return results["fidelity"], results["retrieval"], results["tools"]


def show(
    options: argparse.Namespace,
    conditions: dict[str, str],
    rows: list[Comparison],
    cells: list[RetrievalCell],
    tools: list[ToolCallScore],
) -> None:
    """Print the table and the targets, and write the rows."""
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    reference = next((row.fidelity for row in rows if row.fidelity is not None), None)
    if reference is not None:
        print(
            f"{reference.windows} windows of {options.window} tokens, {reference.scored_tokens} scored, "
            f"uncompressed perplexity {reference.reference_perplexity:.4f}\n"
        )
    print_table(rows, cells, tools)
    if cells:
        print_retrieval(cells)
    print_targets(rows, cells)
    more: dict[str, dict[str, object]] = {
        "retrieval": {},
        "retrieval_relative": {},
        "tools_valid": {},
        "tools_correct": {},
    }
    for name in {cell.codec for cell in cells}:
        more["retrieval"][name], more["retrieval_relative"][name] = (
            accuracy(cells, name),
            relative_retrieval(cells, name),
        )
    for score in tools:
        more["tools_valid"][score.codec] = score.valid / score.total
        more["tools_correct"][score.codec] = score.correct / score.total
    write_csv(options.out, rows, conditions, more)
    print(f"\nRows: {os.path.relpath(options.out)}")
    if cells:
        write_retrieval(options.out.with_name(f"{options.out.stem}_retrieval.csv"), cells, conditions)
    if options.plot is not None and reference is not None:
        from turboquant_local.evaluation.plots import plot_frontier

        smaller = [row for row in rows if row.size.compression > 1.1]  # those that lose nothing are off the scale
        title = f"{conditions['model']}, {reference.windows} windows of {options.window} tokens"
        plot_frontier(smaller, options.plot, title=title)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Quality of the presets and of other codecs.")
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-model"), help="a folder, or a name on the hub")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="float32 has the lowest floor")
    parser.add_argument("--text", type=Path, default=ROOT / "benchmarks/data/wikitext-2-valid.txt")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), help="names, or name:field=value,field=value")
    parser.add_argument("--window", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=int, help="most windows; the whole text without it")
    parser.add_argument("--context", type=int, default=512, help="first tokens of a window, which are not scored")
    parser.add_argument("--stride", type=int, help="tokens between the starts of windows; a window if not given")
    parser.add_argument("--chunk", type=int, default=32, help="tokens fed at a time, at least; 1 is decoding itself")
    parser.add_argument("--batch-size", type=int, default=1, help="windows fed together")
    parser.add_argument("--samples", type=int, default=10, help="prompts a task, length and depth; 0: no retrieval")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens of retrieval prompts")
    parser.add_argument("--depths", nargs="+", type=float, default=list(DEPTHS), help="where the asked fact stands")
    parser.add_argument("--tool-samples", type=int, default=50, help="requests for tools; 0: none")
    parser.add_argument("--task-codecs", nargs="*", default=list(PRESETS), help="codecs for retrieval and tools")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work and the GPUs")
    parser.add_argument("--plot", type=Path, help="file for a plot of loss against bytes")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/quality.csv")
    options = parser.parse_args()

    for name in (*options.codecs, *options.task_codecs):
        find_codec(name)  # an unknown one is refused before anything is measured
    conditions = {
        "model": Path(options.model).name,
        **environment(torch.device(options.device)),
        "dtype": options.dtype,
        "chunk": str(options.chunk),
        "text": options.text.name,
    }
    show(options, conditions, *measure(options))


if __name__ == "__main__":
    main()
