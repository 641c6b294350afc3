"""What the commands have in common: options, the text, progress, and errors as one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from turboquant_local.engine.loading import LoadedModel
from turboquant_local.errors import EvaluationError, TurboQuantError
from turboquant_local.evaluation.default_text import default_text
from turboquant_local.evaluation.environment import environment
from turboquant_local.evaluation.windows import WINDOW_LENGTH, cut_windows, read_text

ModelOption = Annotated[str, typer.Option(help="A folder, a name on the Hugging Face hub, or testing:llama.")]
TextOption = Annotated[
    Path | None, typer.Option(help="UTF-8 text to measure on. Without it: the reference that comes with Python.")
]
WindowsOption = Annotated[int, typer.Option(min=1, help="Windows of text to measure on, at most.")]
WindowOption = Annotated[
    int | None, typer.Option(min=3, help="Tokens of a window. [default: 2048, or the model's context]")
]
ContextOption = Annotated[
    int | None, typer.Option(min=0, help="First tokens of a window, which are not scored. [default: a quarter]")
]
StrideOption = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens between the starts of windows. [default: every token is scored once]"),
]
ChunkOption = Annotated[int, typer.Option(min=1, help="Tokens fed at a time, at least; 1 is decoding itself.")]
DeviceOption = Annotated[str | None, typer.Option(help="A torch device. [default: the best one]")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16; float32 has the lowest floor.")]


@contextmanager
def told_errors() -> Iterator[None]:
    """Errors that are meant for the user become one line on stderr and exit code 2."""
    logging.disable_progress_bar()
    try:
        yield
    except TurboQuantError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


def windows_of(
    loaded: LoadedModel,
    text: Path | None,
    window: int | None,
    windows: int,
    context: int | None,
    stride: int | None,
) -> tuple[torch.Tensor, int]:
    """The windows that the options ask for, and their context.

    Raises:
        EvaluationError: The window is longer than the model's context, or the text shorter than the window.
    """
    length = window or min(WINDOW_LENGTH, loaded.context_length)
    if length > loaded.context_length:
        raise EvaluationError(
            f"window={length}: this model has a context of {loaded.context_length} tokens; take fewer"
        )
    start = length // 4 if context is None else context
    content = default_text() if text is None else read_text(text)
    step = max(1, length - start - 1) if stride is None else stride
    return cut_windows(loaded.tokenizer, content, length, stride=step, limit=windows), start


def output() -> Console:
    """stdout; wide enough for the tables where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=110)


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on the console; the value is called with the name of each step that is done."""
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=total)

        def advance(name: str) -> None:
            bar.update(task, advance=1, description=name)

        yield advance


def conditions(model: str, loaded: LoadedModel) -> dict[str, str]:
    """What the figures depend on."""
    return {"model": model, "dtype": str(loaded.model.dtype).removeprefix("torch."), **environment(loaded.device)}


def told(conditions: dict[str, str]) -> str:
    """The conditions in one line."""
    return ", ".join(f"{name} {value}" for name, value in conditions.items())
