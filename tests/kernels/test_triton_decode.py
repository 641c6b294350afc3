"""What only decode attention in Triton has: launches, slices, float16 weights; in the interpreter without a GPU."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from turboquant_local.errors import BackendError
from turboquant_local.kernels import api
from turboquant_local.kernels.layout import KVView, PackedKV

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
GPU = torch.cuda.is_available()
pytestmark = pytest.mark.usefixtures("_poisoned")

from turboquant_local.kernels.triton import decode_attention, decode_kernels  # noqa: E402  after the skip


def test_values_of_any_size(case: Any) -> None:
    """Weights in float16 must not lose small values beside large ones, nor overflow."""
    dtype = torch.float16
    keys, values = case.views(131, 1, 64, 64, dtype=dtype, batch=1)
    query = case.queries(1, 1, 64, dtype, batch=1)
    for factor in (2**-13, 2**10):
        scaled = mapped(replace(values, sinks=values.sinks * factor, recent=values.recent * factor), times(factor))
        truth = case.exact(query, keys, scaled, case.causal(1, 131))
        out = api.attention(query, keys, scaled, impl="triton")
        assert case.error(out, truth) < (2e-3 if factor > 1 else 2e-2)  # float16 itself loses bits below 2**-14


@pytest.mark.parametrize(
    ("far", "near", "q_length", "bits"),
    [(0, 0, 1, 4), (0, 32, 1, 4), (1, 32, 2, 3), (32, 5, 1, 2), (64, 32, 3, 4), (95, 0, 1, 6), (112, 32, 1, 16)],
)
def test_lengths_on_the_device_are_those_of_shorter_tensors(
    far: int, near: int, q_length: int, bits: int, case: Any
) -> None:
    """The rest of the buffers may hold anything."""
    tokens = 3 + far + near + 5
    query = case.queries(4, q_length, 64)
    whole = case.views(187, 2, 64, 64, bits, bits)
    lengths = torch.tensor([3, far, near, 5], dtype=torch.int32, device=case.device)
    in_use, roomy = [], []
    for side in whole:
        some = KVView(side.sinks, side.far.tokens(0, far), side.near.tokens(0, near), side.recent[:, :, :5])
        in_use.append(some)
        roomy.append(replace(side, **{name: spoiled(getattr(side, name), getattr(some, name)) for name in PARTS}))
    roomy = [replace(side, lengths=lengths) for side in roomy]
    visible = case.causal(q_length, tokens)
    truth = case.exact(query, *in_use, visible)
    wider = torch.nn.functional.pad(visible, (0, 187 - tokens), value=True)[None, None]
    for mask in (None, wider):
        out = api.attention(query, *roomy, mask=mask, impl="triton")
        assert case.error(out, truth) < 2e-6


PARTS = ("sinks", "far", "near", "recent")


def spoiled(whole: Any, used: Any) -> Any:
    """Not a number, and bytes of any kind, behind the tokens in use."""
    if isinstance(whole, PackedKV):
        scales = None if whole.scales is None else spoiled(whole.scales, used.scales)
        return replace(whole, codes=spoiled(whole.codes, used.codes), scales=scales)
    out = torch.full_like(whole, torch.nan if whole.is_floating_point() else 0xFF)
    out[:, :, : used.shape[2]] = used
    return out


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
def test_slices_of_a_larger_storage(start: int, stop: int, case: Any) -> None:
    """A preallocated cache hands out views of its buffers, at any offset; a model, a transposed query."""
    whole = case.views(163, 2, 64, 64)
    keys, values = (mapped(side, lambda part: cut(part, start, stop)) for side in whole)
    query = case.queries(2, 4, 64).transpose(1, 2)
    truth = case.exact(query, keys, values, case.causal(2, keys.shape[2]))
    assert case.error(api.attention(query, keys, values, impl="triton"), truth) < 2e-6


def cut(part: PackedKV, start: int, stop: int) -> PackedKV:
    part = part.tokens(start, stop)
    if part.mean is None:
        return part
    mean = torch.stack([part.mean, part.mean + 1], dim=-2).flatten(2, 3)[:, :, ::2]
    assert not mean.is_contiguous()
    return replace(part, mean=mean)


def test_any_cut_of_the_work_gives_the_same(case: Any) -> None:
    keys, values = case.views(700, 1, 64, 64, batch=1)
    query = case.queries(2, 1, 64, batch=1)
    truth = case.exact(query, keys, values, case.causal(1, 700))
    settings = {"mask": None, "causal": False, "scaling": 64**-0.5, "softcap": None, "sink_logits": None}
    for launch in (
        decode_attention.Launch(warps=1, tokens=32, waves=40),
        decode_attention.Launch(warps=2, tokens=64, waves=3),
        decode_attention.Launch(warps=4, tokens=32, waves=1),
    ):
        out = decode_attention.attention(query, keys, values, **settings, launch=launch)
        assert case.error(out, truth) < 2e-6


@pytest.mark.parametrize(("group", "tokens", "waves"), [(8, 700, 40), (12, 1100, 40), (12, 700, 7)])
def test_many_shares_are_merged_in_branches(
    group: int, tokens: int, waves: float, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where even the branches are too many at once, and where programs with near tokens have far ones as well."""
    monkeypatch.setattr(decode_attention, "multiprocessors", lambda _: 1)
    keys, values = case.views(tokens, 1, 64, 64, batch=1)
    query = case.queries(group, 1, 64, batch=1)
    sink_logits = torch.arange(group, device=case.device) / group
    launch = decode_attention.Launch(warps=1, tokens=32, waves=waves, others=1)
    for _ in range(2):  # it leaves the counters as they were
        out = decode_attention.attention(
            query, keys, values, mask=None, causal=False, scaling=64**-0.5, softcap=None, sink_logits=sink_logits,
            launch=launch,
        )  # fmt: skip
        truth = case.exact(query, keys, values, case.causal(1, tokens), sink_logits=sink_logits)
        assert case.error(out, truth) < 2e-6


@pytest.mark.parametrize(
    ("k_bits", "v_bits", "dim", "group", "q_length"),
    [(4, 4, 128, 4, 1), (4, 2, 64, 2, 2), (3, 3, 128, 2, 2), (8, 4, 128, 7, 1), (3, 3, 128, 8, 1), (6, 4, 128, 1, 1)],
)
def test_whole_tiles_however_they_come(
    k_bits: int, v_bits: int, dim: int, group: int, q_length: int, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brought by the copy engine, with both halves side by side, or neither; with a mask that hides half."""
    dtype = torch.float16 if GPU else torch.float32
    keys, values = case.views(850, 2, dim, dim, k_bits, v_bits, dtype=dtype, batch=1)
    query = case.queries(2 * group, q_length, dim, dtype, batch=1)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(q_length, 850, generator=generator).to(case.device) > 0.5
    brought: list[int] = []
    tiles = decode_attention._tiles
    monkeypatch.setattr(decode_attention, "_tiles", lambda *x: (brought.append(1), tiles(*x))[1])
    for sides, copies in ((1, False), (2, False), (1, True), (2, True)):
        launch = decode_attention.Launch(warps=2, waves=0.1, sides=sides, copies=copies, others=1)
        for shown in (None, mask[None, None]):
            brought.clear()
            out = decode_attention.attention(
                query, keys, values, mask=shown, causal=False, scaling=dim**-0.5, softcap=None, sink_logits=None,
                launch=launch,
            )  # fmt: skip
            truth = case.exact(query, keys, values, mask if shown is not None else mask | True)
            assert case.error(out, truth) < (2e-3 if GPU else 2e-6)
            whole = k_bits != 6 and (k_bits != 3 or (sides == 2 and group * q_length <= 4))
            assert bool(brought) == (copies and whole)


def test_refusals_name_the_reason_and_auto_falls_back(case: Any) -> None:
    keys, values = case.views(90, 2, 64, 64)
    short = case.queries(4, 1, 64)
    assert api.choose(short, keys, values) == ("triton" if GPU else "reference")
    with pytest.raises(BackendError, match="dtypes"):
        api.attention(short.half(), keys, values, impl="triton")
    with pytest.raises(BackendError, match="nothing is packed"):
        api.attention(short, *case.views(20, 2, 64, 64), impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device; CI has none")
def test_the_length_compiles_nothing_anew(case: Any) -> None:
    def variants() -> int:
        return sum(len(cache[0]) for cache in decode_kernels.attend.device_caches.values())

    query = case.queries(8, 1, 128, torch.bfloat16)
    for tokens in (150, 182, 6000):  # the last has too many shares to merge at once: that is the only other variant
        api.attention(query, *case.views(tokens, 2, 128, 128, dtype=torch.bfloat16), impl="triton")
    before = variants()
    for tokens in (151, 214, 500, 1023, 2001, 5000):
        api.attention(query, *case.views(tokens, 2, 128, 128, dtype=torch.bfloat16), impl="triton")
    assert variants() == before
