"""Bits go to the layers that lose most, and no more of them than there were."""

import itertools

import pytest
import torch

from turboquant_local import TurboQuantCache, TurboQuantConfig
from turboquant_local.codec.codebook import lloyd_max
from turboquant_local.errors import ConfigError, EvaluationError
from turboquant_local.evaluation.codecs.turboquant import TurboQuantCodec
from turboquant_local.evaluation.fidelity import measure_fidelity
from turboquant_local.evaluation.layer_bits import WIDTHS, LayerShare, _knapsack, divide_bits, settings
from turboquant_local.testing import random_tokens, tiny_model


def test_a_layer_that_attends_sharply_gets_the_bits_of_others() -> None:
    model, windows, steps = tiny_model("llama"), random_tokens(2, 260), []
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(100)
    plain = TurboQuantConfig(near_length=0)
    shares = divide_bits(model, windows[:1], plain, context=100, on_progress=steps.append)
    assert [share.layer for share in shares] == [0, 1, 2, 3]
    assert len(steps) == 8
    loudest = max(shares, key=lambda share: share.keys_kl)
    assert (loudest.layer, loudest.k_bits) == (0, 6)
    assert sum(share.k_bits + share.v_bits for share in shares) <= 4 * 8
    tuned = settings(plain, shares)
    assert TurboQuantCache(model.config, tuned).kv_cache == tuned
    codecs = [TurboQuantCodec("plain", plain), TurboQuantCodec("tuned", tuned)]
    before, after = measure_fidelity(model, windows[1:], codecs, context=100)
    assert after.kl_mean < 0.8 * before.kl_mean


def test_no_other_division_loses_less() -> None:
    losses, total = [3e-4, 1e-6, 2e-5, 8e-5, 4e-6], 17
    error = {bits: lloyd_max(128, bits).mse for bits in WIDTHS}

    def loss(bits: tuple[int, ...]) -> float:
        return sum(loss * error[width] for loss, width in zip(losses, bits, strict=True))

    allowed = (bits for bits in itertools.product(WIDTHS, repeat=len(losses)) if sum(bits) <= total)
    assert loss(tuple(_knapsack(losses, total))) == pytest.approx(min(map(loss, allowed)))


def test_what_cannot_be_divided_is_refused() -> None:
    for preset in ("identity", "extreme"):
        with pytest.raises(EvaluationError, match=r"k_bits=.*, v_bits=.*: expected more than 2 and fewer than 6 bits"):
            divide_bits(tiny_model("llama"), random_tokens(1, 260), TurboQuantConfig(preset=preset))
    with pytest.raises(EvaluationError, match="no layer of it is compressed"):
        divide_bits(tiny_model("mistral"), random_tokens(1, 260), TurboQuantConfig())
    with pytest.raises(EvaluationError, match=r"windows of 260 tokens: none of them is packed .* more than 324"):
        divide_bits(tiny_model("llama"), random_tokens(1, 260), TurboQuantConfig())
    shares = [LayerShare(9, 0.0, 0.0, 4, 4)]
    with pytest.raises(ConfigError, match=r"layer_bits: layer 9 of this model is not compressed \(it has 4 layers\)"):
        TurboQuantCache(tiny_model("llama").config, settings(TurboQuantConfig(), shares))
