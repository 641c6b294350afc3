"""Perplexity, KL divergence and agreement against transformers' own loss and against plain definitions."""

import math
from collections.abc import Iterable

import pytest
import torch

from turboquant_local.errors import EvaluationError
from turboquant_local.evaluation.codecs.base import decoding_chunks
from turboquant_local.evaluation.codecs.registry import find_codec
from turboquant_local.evaluation.fidelity import CHUNK, measure_fidelity
from turboquant_local.evaluation.intervals import mean_interval, t_quantile
from turboquant_local.testing import random_tokens, tiny_model


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3.5"])
def test_the_identity_codec_changes_nothing(name: str) -> None:
    windows = random_tokens(2, 260)
    (got,) = measure_fidelity(tiny_model(name), windows, [find_codec("identity")], context=100)
    assert got.windows == 2
    assert got.scored_tokens == 2 * (260 - 101)
    assert got.kl_mean < 1e-6
    assert abs(got.perplexity_change) < 1e-5
    assert got.top1_agreement > 0.99


def test_perplexity_is_that_of_transformers_own_loss() -> None:
    model, windows, context = tiny_model("llama"), random_tokens(3, 200), 50
    labels = windows.clone()
    labels[:, : context + 1] = -100  # transformers shifts labels itself
    with torch.inference_mode():
        loss = model(windows, labels=labels).loss
    (got,) = measure_fidelity(model, windows, [find_codec("identity")], context=context, batch_size=2)
    assert got.reference_perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_divergence_is_the_definition_on_logits_from_decoding() -> None:
    """Through the same cache with a sum written out, in the same chunks and token by token."""
    model, ids, context = tiny_model("qwen3"), random_tokens(1, 200), 150
    codec = find_codec("extreme:near_length=64")
    (got,) = measure_fidelity(model, ids, [codec], context=context)
    with torch.inference_mode():
        exact = model(ids[:, :-1]).logits[0, context:].double().softmax(-1)

    def divergence(chunks: Iterable[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        cache = codec.cache(model.config)
        with torch.inference_mode():
            steps = [model(ids[:, start:stop], past_key_values=cache).logits[0] for start, stop in chunks]
        compressed = torch.cat(steps)[context:].double().softmax(-1)
        return (exact * (exact / compressed).log()).sum(-1), exact.argmax(-1) == compressed.argmax(-1)

    kl, agreed = divergence(decoding_chunks(codec, 199, CHUNK))
    assert got.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert got.kl_median == pytest.approx(float(kl.median()), rel=1e-4)
    assert got.kl_tail == pytest.approx(float(kl.max()), rel=1e-4)  # of 49 tokens
    assert got.top1_agreement == pytest.approx(float(agreed.double().mean()))
    # Products of other sizes round otherwise, and a code on a boundary may then be the other one.
    single, _ = divergence((i, i + 1) for i in range(199))
    assert got.kl_mean == pytest.approx(float(single.mean()), rel=1e-2)


def test_fewer_bits_lose_more() -> None:
    names = ["turboquant_k8v4", "balanced", "compact", "balanced:k_bits=2,v_bits=2"]
    found = measure_fidelity(
        tiny_model("llama"), random_tokens(2, 400), [find_codec(name) for name in names], context=200
    )
    losses = [result.kl_mean for result in found]
    assert losses == sorted(losses)
    assert losses[0] > 0
    assert [result.codec for result in found] == names


def test_batches_and_the_order_of_codecs_do_not_matter() -> None:
    model, windows = tiny_model("llama"), random_tokens(3, 260)
    names = ["compact", "kivi-2"]
    one = measure_fidelity(model, windows, [find_codec(name) for name in names], context=100)
    other = measure_fidelity(model, windows, [find_codec(name) for name in reversed(names)], context=100, batch_size=3)
    for a, b in zip(one, reversed(other), strict=True):
        assert a.kl_mean == pytest.approx(b.kl_mean, rel=0.05)  # a rounding may move a code
        assert a.perplexity == pytest.approx(b.perplexity, rel=1e-3)


def test_the_interval_is_paired_over_windows() -> None:
    model, windows = tiny_model("llama"), random_tokens(5, 300)
    codec = find_codec("extreme")
    (together,) = measure_fidelity(model, windows, [codec], context=100)
    changes = [
        math.log1p(result.perplexity_change)
        for window in windows
        for result in measure_fidelity(model, window[None], [codec], context=100)
    ]
    mean, spread = sum(changes) / 5, torch.tensor(changes, dtype=torch.float64).std().item()
    low, high = (math.expm1(mean + sign * 2.7764 * spread / 5**0.5) for sign in (-1, 1))
    assert together.perplexity_interval == pytest.approx((low, high), rel=1e-3)
    assert measure_fidelity(model, windows[:1], [codec], context=100)[0].perplexity_interval is None


def test_the_model_gets_its_attention_back() -> None:
    model = tiny_model("llama")
    before = model.config._attn_implementation
    measure_fidelity(model, random_tokens(1, 200), [find_codec("compact")], context=100)
    assert model.config._attn_implementation == before != "turboquant"


def test_progress_is_told() -> None:
    told: list[str] = []
    codecs = [find_codec("compact"), find_codec("fp8")]
    measure_fidelity(tiny_model("llama"), random_tokens(2, 150), codecs, context=100, on_progress=told.append)
    assert told == ["compact", "fp8"] * 2


@pytest.mark.parametrize("context", [-1, 199, 200])
def test_a_context_that_leaves_nothing_is_refused(context: int) -> None:
    with pytest.raises(EvaluationError, match=f"context={context}: expected 0 to 198"):
        measure_fidelity(tiny_model("llama"), random_tokens(1, 200), [find_codec("compact")], context=context)


@pytest.mark.parametrize(
    ("degrees", "probability", "quantile"),
    [(1, 0.975, 12.706), (2, 0.975, 4.303), (10, 0.975, 2.228), (168, 0.975, 1.974), (30, 0.95, 1.697)],
)
def test_quantiles_are_those_of_the_printed_tables(degrees: int, probability: float, quantile: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(quantile, abs=6e-4)


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = 3 + torch.randn(1000, 4, generator=generator)
    covered = sum(low <= 3 <= high for low, high in (mean_interval(row.tolist()) or (1, 0) for row in samples))
    assert covered == pytest.approx(950, abs=25)
    assert mean_interval([1.0]) is None
