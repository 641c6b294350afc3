"""The reference attention against float64 over the decompressed keys and values."""

from dataclasses import replace

import pytest
import torch

from turboquant_local.cache import storage
from turboquant_local.cache.layer import make_codec
from turboquant_local.codec import MSEQuantizer
from turboquant_local.config import TurboQuantConfig
from turboquant_local.errors import BackendError, CacheError
from turboquant_local.kernels import api
from turboquant_local.kernels.layout import KVView


def filled(x: torch.Tensor, config: TurboQuantConfig, bits: int, keys: bool = False) -> KVView:
    view = storage.append(storage.empty(x), x)
    return storage.settle(view, config, make_codec(config, x.shape[-1], bits, keys))


def keys_and_values(
    config: TurboQuantConfig, heads: int, tokens: int, k_dim: int, v_dim: int, batch: int = 2
) -> tuple[KVView, KVView]:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(batch, heads, tokens, k_dim, generator=generator) + 2 * torch.randn(k_dim, generator=generator)
    v = torch.randn(batch, heads, tokens, v_dim, generator=generator)
    return filled(k, config, config.k_bits, keys=True), filled(v, config, config.v_bits)


def exact(
    query: torch.Tensor,
    keys: KVView,
    values: KVView,
    visible: torch.Tensor,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    group = query.shape[1] // keys.shape[1]
    k = storage.dequantize(keys).double().repeat_interleave(group, 1)
    v = storage.dequantize(values).double().repeat_interleave(group, 1)
    scores = query.double() @ k.mT * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sink_logits is not None:
        column = sink_logits.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v
    return scores.softmax(-1) @ v


def relative_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    return ((out.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


def causal(q_length: int, kv_length: int) -> torch.Tensor:
    return torch.ones(q_length, kv_length, dtype=torch.bool).tril(kv_length - q_length)


SMALL = {"sink_length": 3, "residual_length": 20, "near_length": 16}
SHAPES = [
    pytest.param(8, 2, 1, 163, 128, 128, {"k_bits": 4, "v_bits": 4}, id="decode-gqa-d128-k4v4"),
    pytest.param(4, 4, 1, 63, 64, 64, {"k_bits": 3, "v_bits": 2}, id="decode-mha-d64-k3v2"),
    pytest.param(6, 1, 7, 200, 96, 96, {"k_bits": 8, "v_bits": 4}, id="chunk-mqa-d96-k8v4"),
    pytest.param(4, 2, 33, 150, 80, 64, {"k_bits": 2, "v_bits": 3}, id="chunk-gqa-k80v64-k2v3"),
    pytest.param(4, 2, 5, 90, 192, 128, {"k_bits": 1, "v_bits": 16}, id="chunk-gqa-k192v128-k1v16"),
    pytest.param(2, 2, 90, 90, 64, 64, {"k_bits": 16, "v_bits": 16}, id="all-at-once-identity"),
]


@pytest.mark.parametrize(("q_heads", "heads", "q_length", "tokens", "k_dim", "v_dim", "bits"), SHAPES)
@pytest.mark.parametrize("small_tiles", [False, True])
def test_attention_equals_float64_on_the_decompressed_tensors(
    q_heads: int,
    heads: int,
    q_length: int,
    tokens: int,
    k_dim: int,
    v_dim: int,
    bits: dict[str, int],
    small_tiles: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if small_tiles:
        monkeypatch.setattr("turboquant_local.kernels.reference._TILE_ELEMENTS", 1)
    keys, values = keys_and_values(TurboQuantConfig(**SMALL, **bits), heads, tokens, k_dim, v_dim)
    query = torch.randn(2, q_heads, q_length, k_dim, generator=torch.Generator().manual_seed(1))
    truth = exact(query, keys, values, causal(q_length, tokens))
    assert relative_error(api.attention(query, keys, values), truth) < 2e-6
    mask = causal(q_length, tokens).expand(2, 1, -1, -1)
    assert relative_error(api.attention(query, keys, values, mask=mask), truth) < 2e-6
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert relative_error(api.attention(query, keys, values, mask=additive), truth) < 2e-6


def test_softcap_and_sink_logits() -> None:
    keys, values = keys_and_values(TurboQuantConfig(**SMALL), 2, 131, 64, 64)
    query = 5 * torch.randn(2, 6, 3, 64, generator=torch.Generator().manual_seed(1))
    logits = torch.linspace(-2, 6, 6)
    truth = exact(query, keys, values, causal(3, 131), softcap=7.0, sink_logits=logits)
    out = api.attention(query, keys, values, softcap=7.0, sink_logits=logits)
    assert relative_error(out, truth) < 2e-6


def test_left_padding_hides_tokens_in_every_segment_and_hidden_rows_give_zero() -> None:
    keys, values = keys_and_values(TurboQuantConfig(**SMALL), 2, 131, 64, 64)
    query = torch.randn(2, 4, 2, 64, generator=torch.Generator().manual_seed(1))
    mask = causal(2, 131).repeat(2, 1, 1, 1)
    mask[0, ..., :120] = False  # the whole packed part, and some of the window
    out = api.attention(query, keys, values, mask=mask)
    assert relative_error(out, exact(query, keys, values, mask)) < 2e-6
    mask[1, :, 0] = False
    assert torch.equal(api.attention(query, keys, values, mask=mask)[1, :, 0], torch.zeros(4, 64))


def test_a_mask_per_query_head() -> None:
    keys, values = keys_and_values(TurboQuantConfig(**SMALL), 2, 131, 64, 64)
    query = torch.randn(2, 4, 1, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(2, 4, 1, 131, generator=torch.Generator().manual_seed(2)) > 0.3
    assert relative_error(api.attention(query, keys, values, mask=mask), exact(query, keys, values, mask)) < 2e-6


def test_not_causal_sees_everything() -> None:
    keys, values = keys_and_values(TurboQuantConfig(**SMALL), 2, 131, 64, 64)
    query = torch.randn(2, 4, 9, 64, generator=torch.Generator().manual_seed(1))
    truth = exact(query, keys, values, torch.ones(9, 131, dtype=torch.bool))
    assert relative_error(api.attention(query, keys, values, causal=False), truth) < 2e-6


def test_low_precision_queries_keep_their_dtype() -> None:
    config = TurboQuantConfig(**SMALL)
    k, v = (torch.randn(1, 2, 100, 64, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
    keys, values = filled(k, config, 4), filled(v, config, 4)
    query = torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    out = api.attention(query, keys, values)
    assert out.dtype == torch.bfloat16
    view = (
        replace(keys, sinks=keys.sinks.float(), recent=keys.recent.float()),
        replace(values, sinks=values.sinks.float(), recent=values.recent.float()),
    )
    assert relative_error(out, exact(query, *view, causal(1, 100))) < 4e-3  # one rounding to bfloat16


def test_centering_makes_keys_with_a_bias_as_good_as_keys_without() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(1, 1, 400, 64, generator=generator)
    bias = torch.zeros(64).index_fill(0, torch.tensor([3]), 100.0)
    query = torch.randn(1, 1, 1, 64, generator=generator)
    value = torch.randn(1, 1, 400, 64, generator=generator)

    def error(keys: torch.Tensor, center: bool) -> float:
        config = TurboQuantConfig(**SMALL)
        packed = filled(keys, config, 3, center), filled(value, config, 16)
        exact_view = filled(keys, config, 16), packed[1]
        return relative_error(api.attention(query, *packed), exact(query, *exact_view, causal(1, 400)))

    assert error(plain + bias, center=True) < 1.5 * error(plain, center=True)
    assert error(plain + bias, center=False) > 5 * error(plain, center=True)


def test_refusals() -> None:
    keys, values = keys_and_values(TurboQuantConfig(**SMALL), 2, 131, 64, 64)
    query = torch.randn(2, 4, 1, 64)
    with pytest.raises(BackendError, match=r"impl='cuda': this installation has reference"):
        api.attention(query, keys, values, impl="cuda")
    with pytest.raises(CacheError, match="multiple of their heads"):
        api.attention(query[:, :3], keys, values)
    with pytest.raises(CacheError, match="of 131 keys or more"):
        api.attention(query, keys, values, mask=torch.ones(2, 1, 1, 100, dtype=torch.bool))
    with pytest.raises(CacheError, match="only keys can be centred"):
        api.attention(query, keys, keys)
    with pytest.raises(CacheError, match=r"\[batch, num_kv_heads, tokens, 128\]"):
        api.quantize_kv(torch.zeros(1, 1, 1, 64), MSEQuantizer(128, 4))
    with pytest.raises(CacheError, match="8-bit scales need a unit"):
        api.quantize_kv(torch.zeros(1, 1, 1, 128), MSEQuantizer(128, 4, scale_bits=8))
    with pytest.raises(CacheError, match="parts of equal lengths"):
        api.attention(query, keys, replace(values, near=None, recent=torch.zeros(2, 2, 32, 64)))
