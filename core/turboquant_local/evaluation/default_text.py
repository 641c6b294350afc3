"""English text that is on every machine: the reference that comes with Python."""

from __future__ import annotations

from turboquant_local.errors import EvaluationError


def default_text() -> str:
    """Python's own language reference, as `help()` shows it: some 700,000 characters.

    It differs a little from one version of Python to the next.

    Raises:
        EvaluationError: This Python came without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise EvaluationError(
            "text: this Python has no pydoc_data, which serves as the default; name a file"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))
