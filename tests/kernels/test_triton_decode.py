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
    for tokens in (150, 182, 3000):  # the last has more shares to merge: that is one more variant, and all there are
        api.attention(query, *case.views(tokens, 2, 128, 128, dtype=torch.bfloat16), impl="triton")
    before = variants()
    for tokens in (151, 214, 500, 1023, 2001, 5000):
        api.attention(query, *case.views(tokens, 2, 128, 128, dtype=torch.bfloat16), impl="triton")
    assert variants() == before
