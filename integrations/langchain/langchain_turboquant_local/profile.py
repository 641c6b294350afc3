"""What a model can do, read from its files without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from huggingface_hub import try_to_load_from_cache
from langchain_core.language_models import ModelProfile

from turboquant_local.engine.model_files import resolve_model

_TEXT_ONLY: Final = ModelProfile(
    text_inputs=True,
    text_outputs=True,
    image_inputs=False,
    image_url_inputs=False,
    pdf_inputs=False,
    audio_inputs=False,
    video_inputs=False,
    image_tool_message=False,
    pdf_tool_message=False,
    image_outputs=False,
    audio_outputs=False,
    video_outputs=False,
    # A grammar holds any model to a schema.
    structured_output=True,
)


def model_profile(model: str, *, revision: str | None, chat_template: str | None) -> ModelProfile:
    """The profile of a model in a folder, or in the local cache of the hub; nothing is downloaded.

    What its files do not tell, because they are not here yet, is left out.

    Args:
        model: A folder or a name on the hub.
        revision: Branch, tag or commit on the hub.
        chat_template: The template in place of the model's own.
    """
    profile = ModelProfile(**_TEXT_ONLY, name=Path(model).name)
    config = _read_json(model, "config.json", revision)
    length = config.get("text_config", config).get("max_position_embeddings")
    if isinstance(length, int):
        profile["max_input_tokens"] = length
    template = chat_template or _template(model, revision)
    if template:
        takes_tools = "tools" in template
        profile["tool_calling"] = profile["tool_choice"] = profile["tool_call_streaming"] = takes_tools
        profile["reasoning_output"] = "think" in template
    return profile


def _template(model: str, revision: str | None) -> str:
    file = _file(model, "chat_template.jinja", revision)
    if file is not None:
        return file.read_text(encoding="utf-8")
    found = _read_json(model, "tokenizer_config.json", revision).get("chat_template")
    # Some tokenizers have several templates, in a list of {"name": ..., "template": ...}.
    return found if isinstance(found, str) else json.dumps(found) if found else ""


def _read_json(model: str, name: str, revision: str | None) -> dict[str, Any]:
    file = _file(model, name, revision)
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    return content


def _file(model: str, name: str, revision: str | None) -> Path | None:
    folder = Path(resolve_model(model))
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        found = try_to_load_from_cache(model, name, revision=revision)
    except ValueError:  # neither a folder nor a name on the hub; loading it will say so
        return None
    return Path(found) if isinstance(found, str) else None
