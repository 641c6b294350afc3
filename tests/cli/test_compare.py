"""`compare`: the table, CSV, the plot, and what it says about bad input."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from turboquant_local.evaluation.codecs.registry import CODECS

Invoke = Callable[..., Result]


def test_a_table_in_the_order_of_bytes(invoke: Invoke, quick: list[str]) -> None:
    done = invoke("compare", *quick, "ours-2", "identity", "kivi-2", "balanced:k_bits=3", "ours-2")
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines() if line.strip()]
    rows = [line for line in lines if line[0] in ("ours-2", "identity", "kivi-2", "balanced:k_bits=3")]
    assert [row[0] for row in rows] == ["identity", "balanced:k_bits=3", "kivi-2", "ours-2"]
    assert rows[0][1:3] == ["16.000", "1.00x"]
    assert float(rows[0][3]) < 1e-6 < float(rows[1][3])


def test_csv_and_plot(invoke: Invoke, quick: list[str], tmp_path: Path) -> None:
    files = ["--csv", tmp_path / "table.csv", "--plot", tmp_path / "plot.png"]
    done = invoke("compare", *quick, "--batch-size", "2", "plain-turboquant-2", "fp8", *files)
    assert done.exit_code == 0, done.output
    read = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["codec"] for row in read] == ["plain-turboquant-2", "fp8"]
    assert read[0]["model"] == "testing:llama"
    assert 0 < float(read[1]["kl_mean"]) < float(read[0]["kl_mean"])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_codecs_that_have_a_name(invoke: Invoke) -> None:
    done = invoke("compare", "--list")
    assert done.exit_code == 0
    assert done.stdout.split() == list(CODECS)


def test_without_names_presets_stand_beside_others(invoke: Invoke, quick: list[str]) -> None:
    done = invoke("compare", *quick)
    assert done.exit_code == 0, done.output
    for name in ("balanced", "compact", "extreme", "fp8", "kivi-3", "hadamard-int-2", "plain-turboquant-4"):
        assert f"\n  {name} " in done.stdout


def test_what_is_skipped_has_its_name_and_the_whole_reason(invoke: Invoke, quick: list[str]) -> None:
    done = invoke("compare", *quick, "--window", "100", "balanced", "identity")
    assert done.exit_code == 0, done.output
    assert "\n  balanced " in done.stdout
    assert "\nbalanced: windows of 100 tokens end before it packs any\n" in done.stdout


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["kivi-5"], "codec='kivi-5': expected one of balanced, "),
        (["kivi-2:groups=3"], "no such field"),
        (["balanced:k_bits"], "expected fields as name=value"),
        (["balanced:k_bits=7"], "k_bits=7: expected one of"),
        (["kivi-2:bits=0"], "bits=0: expected an integer from 1 to 8"),
        (["kivi-2:group=2.5"], "group=2.5: expected an integer from 1"),
    ],
)
def test_bad_names_are_one_line_and_exit_code_2(
    invoke: Invoke, quick: list[str], names: list[str], message: str
) -> None:
    done = invoke("compare", *quick, *names)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
