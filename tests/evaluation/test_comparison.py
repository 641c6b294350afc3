"""Codecs side by side: their bytes, equal bytes, CSV, plots."""

import csv
from pathlib import Path

import pytest

from turboquant_local.errors import EvaluationError
from turboquant_local.evaluation.codecs.base import KVCodec
from turboquant_local.evaluation.codecs.quantized_cache import TransformersQuantizedCache
from turboquant_local.evaluation.codecs.registry import find_codec
from turboquant_local.evaluation.comparison import TOKENS, Comparison, compare, loss_at, size, write_csv
from turboquant_local.evaluation.layers import LayerFidelity
from turboquant_local.evaluation.plots import check_plot, plot_frontier, plot_verification
from turboquant_local.testing import random_tokens, tiny_model


@pytest.fixture(scope="module")
def rows() -> list[Comparison]:
    codecs: list[KVCodec] = [find_codec(name) for name in ("compact", "identity", "kivi-4", "kivi-2")]
    codecs.append(Missing("hqq-4", "hqq", 4))
    return compare(tiny_model("llama"), random_tokens(2, 200), codecs, context=100)


class Missing(TransformersQuantizedCache):
    def missing(self) -> str:
        return "not installed: pip install hqq"


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("uncompressed", 16),
        ("plain-turboquant-4", 4 + 16 / 64),
        ("plain-turboquant-3:v_bits=2", 2.5 + 16 / 64),
        ("plain-turboquant-4:skip_first_layers=1", (4 + 16 / 64) * 3 / 4 + 16 / 4),
        ("fp8", 8 + 16 / 64),
        ("hadamard-int-3", 3 + 32 / 64),
        ("kivi-2", 2 + 32 / 64),
        ("kivi-2:group=32", 3),
        ("tile-scaling-2", 2 + 16 / 64 + 16 / 128),
        ("turboquant-prod-3", (3.5 + 3.25) / 2),
        ("turboquant-mixed-2.5", (16 * 3 + 48 * 2 + 32) / 64 + 1 / 128),
        ("quanto-4", 4.5),
    ],
)
def test_bits_are_what_every_further_token_costs(name: str, bits: float) -> None:
    assert size(find_codec(name), tiny_model("llama").config).bits_per_coordinate == pytest.approx(bits)


def test_compression_counts_everything() -> None:
    config = tiny_model("llama").config
    found = size(find_codec("compact"), config)
    plain = size(find_codec("uncompressed"), config).stored_bytes
    assert plain == 2 * 4 * 2 * 64 * 2 * TOKENS
    assert found.compression == pytest.approx(plain / found.stored_bytes)
    assert found.compression < 16 / found.bits_per_coordinate


def test_a_codec_that_packs_nothing_of_the_windows_has_no_figures() -> None:
    codecs = [find_codec(name) for name in ("uncompressed", "compact", "kivi-2")]
    plain, ours, kivi = compare(tiny_model("llama"), random_tokens(1, 30), codecs, context=20)
    assert plain.fidelity is not None
    assert ours.fidelity is None
    assert kivi.fidelity is None
    assert ours.skipped == "windows of 30 tokens end before it packs any"


def test_rows_keep_their_order_and_say_what_is_missing(rows: list[Comparison]) -> None:
    assert [row.codec for row in rows] == ["compact", "identity", "kivi-4", "kivi-2", "hqq-4"]
    assert [row.fidelity is None for row in rows] == [False] * 4 + [True]
    assert rows[-1].skipped == "not installed: pip install hqq"
    losses = {row.codec: row.fidelity.kl_mean for row in rows if row.fidelity is not None}
    assert losses["identity"] < losses["kivi-4"] < losses["kivi-2"]


def test_loss_at_equal_bytes() -> None:
    points = [(100, 1.0), (400, 0.01), (200, 5.0), (1600, 0.001)]  # the third is beaten by the first
    assert loss_at(200, points) == pytest.approx(0.1)
    assert loss_at(400, points) == pytest.approx(0.01)
    assert loss_at(800, points) == pytest.approx(0.01 / 10**0.5)
    assert loss_at(5000, points) == pytest.approx(0.001)
    assert loss_at(99, points) == pytest.approx(1.0)
    assert loss_at(98, points) is None
    assert loss_at(100, []) is None


def test_csv_can_be_read_back(rows: list[Comparison], tmp_path: Path) -> None:
    path = tmp_path / "results" / "table.csv"
    write_csv(path, rows, {"model": "tiny", "date": "2030-01-01"}, {"retrieval": {"compact": 0.5}})
    read = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["codec"] for row in read] == [row.codec for row in rows]
    assert {row["model"] for row in read} == {"tiny"}
    assert read[0]["retrieval"] == "0.5"
    assert read[-1]["skipped"] == "not installed: pip install hqq"
    assert read[-1]["kl_mean"] == ""
    compact = rows[0].fidelity
    assert compact is not None
    assert compact.perplexity_interval is not None
    assert float(read[0]["kl_mean"]) == pytest.approx(compact.kl_mean, rel=1e-5)
    assert float(read[0]["perplexity_low"]) == pytest.approx(compact.perplexity_interval[0], rel=1e-5)


def test_plots_show_every_codec(rows: list[Comparison], tmp_path: Path) -> None:
    plot_frontier(rows, tmp_path / "new" / "frontier.svg", title="a title", highlight="compact")
    drawn = (tmp_path / "new" / "frontier.svg").read_text()
    for text in ("a title", "compact", "identity", "kivi", "MiB of KV cache at 4096 tokens", "mean KL divergence"):
        assert f"<!-- {text}" in drawn, text
    assert "hqq" not in drawn  # it has no figures
    layers = [LayerFidelity(0, bypassed="sliding window"), LayerFidelity(1, 0.99, 0.98, 0.1, 4.1, 10, 40)]
    plot_verification(layers, rows, tmp_path / "both.svg", title="a title", highlight="compact")
    assert "attention output" in (tmp_path / "both.svg").read_text()


def test_a_plot_that_cannot_be_written_is_refused_before() -> None:
    check_plot(Path("plot.png"))
    with pytest.raises(EvaluationError, match=r"ends in one of .*png"):
        check_plot(Path("plot.doc"))
