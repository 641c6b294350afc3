"""The commands, gathered."""

from __future__ import annotations

import typer

from turboquant_local import __version__
from turboquant_local.cli.compare import compare
from turboquant_local.cli.tune import tune
from turboquant_local.cli.verify import verify

app = typer.Typer(
    name="turboquant-local",
    help="Measure what a KV cache compressed by TurboQuant costs a model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(verify)
app.command()(compare)
app.command()(tune)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"turboquant-local {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Measure what a KV cache compressed by TurboQuant costs a model."""
