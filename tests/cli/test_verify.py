"""`verify`: exit codes, tables, JSON, plots, and what it says about bad input."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from turboquant_local.cli import shared
from turboquant_local.testing import tiny_model

Invoke = Callable[..., Result]
LOOSE = ["--max-kl", "10", "--min-top1", "0"]


def test_a_model_that_passes(invoke: Invoke, quick: list[str]) -> None:
    done = invoke("verify", *quick, *LOOSE)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[-1] == "passed"
    layers = [line.split() for line in lines if re.match(r" +\d ", line)]
    assert [line[0] for line in layers] == ["0", "1", "2", "3"]
    assert all(0.99 < float(cosine) < 1 for line in layers for cosine in line[1:3])
    assert "388 tokens scored in 2 windows" in done.stdout
    assert "(rounding alone: " in done.stdout


def test_a_model_that_fails_names_the_layer(invoke: Invoke, quick: list[str]) -> None:
    done = invoke("verify", *quick, *LOOSE, "--window", "500", "--v-bits", "2", "--threshold", "0.97")
    assert done.exit_code == 1
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failures) == 2
    assert failures[0].startswith("FAILED value_cosine 0.9")
    assert "at least 0.97 (worst: layer " in failures[0]
    assert "ok     key_cosine" in done.stdout


def test_thresholds_of_predictions(invoke: Invoke, quick: list[str]) -> None:
    assert invoke("verify", *quick, "--max-kl", "0", "--min-top1", "0").exit_code == 1
    assert invoke("verify", *quick, "--max-kl", "10", "--min-top1", "1").exit_code == 1
    assert invoke("verify", *quick, "--preset", "identity").exit_code == 0  # with the thresholds as they are


def test_json(invoke: Invoke, quick: list[str]) -> None:
    done = invoke("verify", *quick, *LOOSE, "--preset", "compact", "--k-bits", "4", "--json")
    read = json.loads(done.stdout)
    assert read["passed"] is True
    assert (read["kv_cache"]["preset"], read["kv_cache"]["k_bits"], read["kv_cache"]["v_bits"]) == ("compact", 4, 3)
    assert read["model"] == "testing:llama"
    assert read["windows"] == [2, 260]
    assert {check["figure"] for check in read["checks"]} == {"key_cosine", "value_cosine", "kl_mean", "top1_agreement"}
    assert set(read["checks"][0]) == {"figure", "value", "threshold", "passed", "layer"}
    assert set(read["fidelity"]) == set(read["floor"]) >= {"kl_mean", "kl_tail", "perplexity", "top1_agreement"}
    assert [layer["layer"] for layer in read["layers"]] == [0, 1, 2, 3]
    assert read["tokens"] == 4096
    assert 3 < read["uncompressed_bytes"] / read["stored_bytes"] < 6
    failed = invoke("verify", *quick, "--max-kl", "0", "--json")
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["passed"] is False


def test_auto_says_what_it_chose(invoke: Invoke, quick: list[str]) -> None:
    done = invoke("verify", *quick, *LOOSE, "--preset", "auto", "--model", "testing:qwen2")
    assert done.exit_code == 0, done.output
    assert "qwen2: preset 'turboquant_k8v4' is chosen." in done.stdout


def test_plot(invoke: Invoke, quick: list[str], tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    done = invoke("verify", *quick, *LOOSE, "--k-bits", "3", "--plot", path)
    assert done.exit_code == 0, done.output
    drawn = path.read_text()
    for text in ("balanced, k_bits=3", "compact", "extreme", "attention output", "MiB of KV cache"):
        assert text in drawn


def test_layers_that_stay_uncompressed_say_why(invoke: Invoke, quick: list[str]) -> None:
    done = invoke("verify", *quick, *LOOSE, "--model", "testing:gemma2")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("sliding window") == 2


def test_a_text_of_ones_own(invoke: Invoke, quick: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox. " * 30)
    assert "194 tokens scored in 1 windows" in invoke("verify", *quick, *LOOSE, "--windows", "1", "--text", text).stdout
    stride = invoke("verify", *quick, *LOOSE, "--text", text, "--stride", "260", "--context", "200")
    assert "118 tokens scored in 2 windows" in stride.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "balancd"], "did you mean 'balanced'"),
        (["--k-bits", "5"], "k_bits=5: expected one of 1, 2, "),
        (["--text", "nowhere.txt"], "text='nowhere.txt': expected a text file in UTF-8"),
        (["--window", "20000"], "window=20000: this model has a context of 16384 tokens; take fewer"),
        (["--context", "300"], "context=300: expected 0 to 258"),
        (["--model", "./nowhere"], "no such folder"),
        (["--model", "testing:nothing"], "expected testing: and one of llama"),
        (["--device", "gpu"], "device='gpu': expected a torch device"),
        (["--device", "cuda:99"], "device='cuda:99': torch "),
        (["--dtype", "int4"], "dtype='int4': expected one of auto, float32"),
        (["--plot", "plot.doc"], "expected a file name that ends in one of"),
        (["--plot", "."], "'.' is a directory"),
        (["--plot", "plot.svg", "--model", "testing:qwen3.5"], "its size does not follow from the config"),
        (["--window", "64"], "windows of 64 tokens: they end before a token is packed"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    invoke: Invoke, quick: list[str], options: list[str], message: str
) -> None:
    done = invoke("verify", *quick, *options)
    assert done.exit_code == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert done.stdout == ""


def test_a_text_shorter_than_a_window(invoke: Invoke, quick: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Short.")
    done = invoke("verify", *quick, "--text", text)
    assert done.exit_code == 2
    assert "it has 6 tokens, one window takes 260; give a longer text or a smaller window length" in done.stderr


def test_a_model_from_a_folder(invoke: Invoke, quick: list[str], tmp_path: Path) -> None:
    from turboquant_local.evaluation.models import letter_tokenizer

    tiny_model("qwen3", max_position_embeddings=200).save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    done = invoke("verify", "--model", tmp_path, "--device", "cpu", "--windows", "1", *LOOSE)
    assert done.exit_code == 0, done.output
    assert "149 tokens scored in 1 windows" in done.stdout  # the window is the model's context
    assert "at 200 tokens" in done.stdout


def test_errors_that_are_no_users_fault_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), shared.told_errors():
        raise ZeroDivisionError
