"""Entry point of `turboquant-local`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say how to install what it needs."""
    try:
        from turboquant_local.cli.app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(f"turboquant-local: {package} is not installed; pip install 'turboquant-local[cli]'")
    app()


if __name__ == "__main__":
    main()
