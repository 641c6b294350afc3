"""Decode attention in Triton against float64, in the interpreter where there is no GPU."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from turboquant_local.cache import storage
from turboquant_local.cache.layer import make_codec
from turboquant_local.config import TurboQuantConfig
from turboquant_local.errors import BackendError
from turboquant_local.kernels import api
from turboquant_local.kernels.layout import KVView, PackedKV

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

from turboquant_local.kernels.triton import decode_attention, decode_kernels  # noqa: E402  after the skip
from turboquant_local.kernels.triton import queries as queries_kernels  # noqa: E402

SMALL = {"sink_length": 3, "residual_length": 20, "near_length": 32}


def view(x: torch.Tensor, config: TurboQuantConfig, bits: int, keys: bool) -> KVView:
    whole = storage.append(storage.empty(x), x)
    return storage.settle(whole, config, make_codec(config, x.shape[-1], bits, keys))


def views(
    tokens: int, heads: int, k_dim: int, v_dim: int, dtype: torch.dtype = torch.float32, batch: int = 2, **fields: int
) -> tuple[KVView, KVView]:
    config = TurboQuantConfig(**(SMALL | fields))
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(batch, heads, tokens, k_dim, generator=generator) + 2 * torch.randn(k_dim, generator=generator)
    v = torch.randn(batch, heads, tokens, v_dim, generator=generator)
    k, v = k.to(DEVICE, dtype), v.to(DEVICE, dtype)
    return view(k, config, config.k_bits, keys=True), view(v, config, config.v_bits, keys=False)


def queries(heads: int, length: int, head_dim: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, heads, length, head_dim, generator=generator).to(DEVICE, dtype)


def causal(q_length: int, kv_length: int) -> torch.Tensor:
    return torch.ones(q_length, kv_length, dtype=torch.bool, device=DEVICE).tril(kv_length - q_length)


def exact(
    query: torch.Tensor,
    keys: KVView,
    values: KVView,
    visible: torch.Tensor,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention in float64 over the decompressed tensors."""

    def whole(side: KVView) -> torch.Tensor:
        wide = replace(side, sinks=side.sinks.float(), recent=side.recent.float())
        return storage.dequantize(wide).double().repeat_interleave(query.shape[1] // side.shape[1], 1)

    scores = query.double() @ whole(keys).mT * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sink_logits is not None:
        column = sink_logits.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ whole(values)
    return scores.softmax(-1) @ whole(values)


def relative_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    assert out.isfinite().all()
    return ((out.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the kernels are to write holds NaN before."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poisoned(empty(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poisoned(new_empty(*args, **kwargs)))


SHAPES = [
    # q_heads, heads, q_length, tokens, k_dim, v_dim, k_bits, v_bits
    pytest.param(8, 2, 1, 403, 128, 128, 4, 4, id="gqa-d128-k4v4"),
    pytest.param(4, 4, 1, 63, 64, 64, 3, 2, id="mha-d64-k3v2"),
    pytest.param(6, 1, 7, 200, 96, 96, 8, 4, id="mqa-7-queries-d96-k8v4"),
    pytest.param(2, 2, 2, 150, 80, 64, 2, 3, id="mha-2-queries-k80v64-k2v3"),
    pytest.param(4, 2, 5, 90, 192, 128, 1, 16, id="gqa-5-queries-k192v128-k1v16"),
    pytest.param(2, 1, 8, 90, 256, 256, 16, 1, id="gqa-8-queries-d256-k16v1"),
    pytest.param(2, 2, 1, 90, 64, 64, 16, 16, id="mha-identity"),
    pytest.param(4, 2, 1, 110, 96, 128, 6, 6, id="gqa-k96v128-k6v6"),
]


@pytest.mark.parametrize(("q_heads", "heads", "q_length", "tokens", "k_dim", "v_dim", "k_bits", "v_bits"), SHAPES)
def test_attention_equals_float64_on_the_decompressed_tensors(
    q_heads: int, heads: int, q_length: int, tokens: int, k_dim: int, v_dim: int, k_bits: int, v_bits: int
) -> None:
    keys, values = views(tokens, heads, k_dim, v_dim, k_bits=k_bits, v_bits=v_bits)
    query = queries(q_heads, q_length, k_dim)
    truth = exact(query, keys, values, causal(q_length, tokens))
    assert relative_error(api.attention(query, keys, values, impl="triton"), truth) < 2e-6


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device; CI has none")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("q_heads", "heads", "q_length", "tokens", "k_dim", "v_dim", "k_bits", "v_bits"), SHAPES)
def test_half_precision_is_no_worse_than_its_rounding(
    q_heads: int,
    heads: int,
    q_length: int,
    tokens: int,
    k_dim: int,
    v_dim: int,
    k_bits: int,
    v_bits: int,
    dtype: torch.dtype,
) -> None:
    keys, values = views(tokens, heads, k_dim, v_dim, dtype, k_bits=k_bits, v_bits=v_bits)
    query = queries(q_heads, q_length, k_dim, dtype)
    truth = exact(query, keys, values, causal(q_length, tokens))
    out = api.attention(query, keys, values, impl="triton")
    assert out.dtype == dtype
    assert relative_error(out, truth) < (1e-3 if dtype == torch.float16 else 4e-3)
    assert torch.equal(out, api.attention(query, keys, values, impl="triton"))


def test_masks_of_both_kinds_for_all_heads_and_for_each() -> None:
    keys, values = views(163, 2, 64, 64)
    query = queries(4, 2, 64)
    mask = causal(2, 163).repeat(2, 1, 1, 1)
    mask[0, ..., :150] = False  # left padding: all packed tokens, and some of the window
    truth = exact(query, keys, values, mask)
    assert relative_error(api.attention(query, keys, values, mask=mask, impl="triton"), truth) < 2e-6
    wider = torch.nn.functional.pad(mask, (0, 5))
    assert relative_error(api.attention(query, keys, values, mask=wider, impl="triton"), truth) < 2e-6
    additive = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert relative_error(api.attention(query, keys, values, mask=additive, impl="triton"), truth) < 2e-6
    each = torch.rand(1, 4, 2, 163, device=DEVICE) > 0.3
    out = api.attention(query, keys, values, mask=each, impl="triton")
    assert relative_error(out, exact(query, keys, values, each)) < 2e-6


def test_a_query_that_sees_nothing_gets_zero() -> None:
    keys, values = views(90, 2, 64, 64)
    mask = causal(1, 90).repeat(2, 1, 1, 1)
    mask[1] = False
    out = api.attention(queries(4, 1, 64), keys, values, mask=mask, impl="triton")
    assert out[0].isfinite().all()
    assert torch.equal(out[1], torch.zeros_like(out[1]))


def test_softcap_and_sink_logits() -> None:
    keys, values = views(131, 2, 64, 64)
    query = 5 * queries(6, 3, 64)
    logits = torch.linspace(-2, 6, 6, device=DEVICE)
    truth = exact(query, keys, values, causal(3, 131), 7.0, logits)
    out = api.attention(query, keys, values, softcap=7.0, sink_logits=logits, impl="triton")
    assert relative_error(out, truth) < 2e-6


def test_values_of_any_size() -> None:
    """Weights in float16 must not lose small values beside large ones, nor overflow."""
    dtype = torch.float16
    keys, values = views(131, 1, 64, 64, dtype, batch=1)
    query = queries(1, 1, 64, dtype, batch=1)
    for factor in (2**-13, 2**10):
        scaled = mapped(replace(values, sinks=values.sinks * factor, recent=values.recent * factor), times(factor))
        truth = exact(query, keys, scaled, causal(1, 131))
        out = api.attention(query, keys, scaled, impl="triton")
        assert relative_error(out, truth) < (2e-3 if factor > 1 else 2e-2)  # float16 itself loses bits below 2**-14


def mapped(side: KVView, function: Callable[[PackedKV], PackedKV]) -> KVView:
    far, near = (None if part is None else function(part) for part in (side.far, side.near))
    return replace(side, far=far, near=near)


def times(factor: float) -> Callable[[PackedKV], PackedKV]:
    def scaled(part: PackedKV) -> PackedKV:
        if part.scale_unit is not None:
            return replace(part, scale_unit=part.scale_unit * factor)
        assert part.scales is not None
        return replace(part, scales=part.scales * factor)

    return scaled


@pytest.mark.parametrize(("start", "stop"), [(8, 30), (9, 28)])
def test_slices_of_a_larger_storage(start: int, stop: int) -> None:
    """A preallocated cache hands out views of its buffers, at any offset; a model, a transposed query."""
    whole = views(163, 2, 64, 64)
    keys, values = (mapped(side, lambda part: cut(part, start, stop)) for side in whole)
    query = queries(2, 4, 64).transpose(1, 2)
    truth = exact(query, keys, values, causal(2, keys.shape[2]))
    assert relative_error(api.attention(query, keys, values, impl="triton"), truth) < 2e-6


def cut(part: PackedKV, start: int, stop: int) -> PackedKV:
    part = part.tokens(start, stop)
    if part.mean is None:
        return part
    mean = torch.stack([part.mean, part.mean + 1], dim=-2).flatten(2, 3)[:, :, ::2]
    assert not mean.is_contiguous()
    return replace(part, mean=mean)


def test_any_cut_of_the_work_gives_the_same() -> None:
    keys, values = views(700, 1, 64, 64, batch=1)
    query = queries(2, 1, 64, batch=1)
    truth = exact(query, keys, values, causal(1, 700))
    settings = {"mask": None, "causal": False, "scaling": 64**-0.5, "softcap": None, "sink_logits": None}
    for launch in (
        decode_attention.Launch(warps=1, tokens=32, waves=40),
        decode_attention.Launch(warps=2, tokens=64, waves=3),
        decode_attention.Launch(warps=4, tokens=32, waves=1),
    ):
        out = decode_attention.attention(query, keys, values, **settings, launch=launch)
        assert relative_error(out, truth) < 2e-6


def test_refusals_name_the_reason_and_auto_falls_back() -> None:
    keys, values = views(90, 2, 64, 64)
    long = queries(4, 9, 64)
    with pytest.raises(BackendError, match=r"impl='triton': q_length=9: it serves 1 to 8 query tokens"):
        api.attention(long, keys, values, impl="triton")
    assert api.choose(long, keys, values) == "reference"
    short = queries(4, 1, 64)
    assert api.choose(short, keys, values) == ("triton" if GPU else "reference")
    with pytest.raises(BackendError, match="dtypes"):
        api.attention(short.half(), keys, values, impl="triton")
    with pytest.raises(BackendError, match="nothing is packed"):
        api.attention(short, *views(20, 2, 64, 64), impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device; CI has none")
def test_the_length_compiles_nothing_anew() -> None:
    def variants() -> int:
        kernels = (queries_kernels.prepare, decode_kernels.partials, queries_kernels.combine)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    query = queries(8, 1, 128, torch.bfloat16)
    for tokens in (150, 182):
        api.attention(query, *views(tokens, 2, 128, 128, torch.bfloat16), impl="triton")
    before = variants()
    for tokens in (151, 214, 500, 1023, 3000):
        api.attention(query, *views(tokens, 2, 128, 128, torch.bfloat16), impl="triton")
    assert variants() == before
