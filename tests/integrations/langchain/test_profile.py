"""What a model can do, known before it is loaded."""

import json
from pathlib import Path

import pytest

from langchain_turboquant_local import ChatTurboQuantLocal


def test_it_is_read_from_the_folder(tiny_model: str) -> None:
    profile = ChatTurboQuantLocal(model=tiny_model).profile
    assert profile is not None
    wanted = ("tool_calling", "tool_choice", "tool_call_streaming", "structured_output", "reasoning_output")
    assert all(profile.get(name) for name in wanted)
    assert not any(profile.get(f"{kind}_inputs") for kind in ("image", "pdf", "audio", "video"))
    assert profile["max_input_tokens"] == 4096


@pytest.mark.parametrize("several", [True, False])
def test_a_template_inside_the_tokenizers_config(tmp_path: Path, several: bool) -> None:
    template = "{{ messages }}{{ tools }}"
    content = {"chat_template": [{"name": "default", "template": template}] if several else template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 99}}))
    profile = ChatTurboQuantLocal(model=str(tmp_path)).profile
    assert profile is not None
    assert profile["tool_calling"]
    assert not profile["reasoning_output"]
    assert profile["max_input_tokens"] == 99


def test_a_template_given_by_hand(tiny_model: str) -> None:
    profile = ChatTurboQuantLocal(model=tiny_model, chat_template="{{ messages }}").profile
    assert profile is not None
    assert not profile["tool_calling"]


@pytest.mark.parametrize("name", ["someone/not-downloaded", "./no/such/folder"])
def test_what_is_not_known_is_left_out(name: str) -> None:
    profile = ChatTurboQuantLocal(model=name).profile
    assert profile is not None
    assert profile["structured_output"]
    assert "max_input_tokens" not in profile
    assert "tool_calling" not in profile


def test_one_given_by_hand_stays() -> None:
    assert ChatTurboQuantLocal(model="x/y", profile={"max_input_tokens": 7}).profile == {"max_input_tokens": 7}
