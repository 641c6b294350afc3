"""The codecs of the comparison against formulas written out again, and their bytes against counting by hand."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch

from turboquant_local import TurboQuantConfig, predict_bytes
from turboquant_local.codec import rotation_matrix
from turboquant_local.errors import ConfigError, EvaluationError
from turboquant_local.evaluation.codecs.base import decoding_chunks
from turboquant_local.evaluation.codecs.fake_quantized import FakeQuantizedCodec
from turboquant_local.evaluation.codecs.fp8 import FP8
from turboquant_local.evaluation.codecs.hadamard_int import HadamardInt
from turboquant_local.evaluation.codecs.kivi import KIVIKeys, KIVIValues
from turboquant_local.evaluation.codecs.quantized_cache import TransformersQuantizedCache
from turboquant_local.evaluation.codecs.registry import CODECS, find_codec
from turboquant_local.evaluation.codecs.tile_scaling import TileScaling
from turboquant_local.testing import random_kv, random_tokens, tiny_model


@pytest.fixture
def x() -> torch.Tensor:
    """[1 sequence, 2 heads, 128 tokens, 64 channels], one channel far from 0."""
    vectors = torch.randn(1, 2, 128, 64, generator=torch.Generator().manual_seed(0))
    vectors[..., 5] += 20
    return vectors


def nearest_of(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return levels[(values[:, None] - levels[None]).abs().argmin(1)]


def min_max(vector: torch.Tensor, bits: int) -> torch.Tensor:
    """Each number goes to the nearest of 2**bits evenly spaced levels between the least and the greatest."""
    return nearest_of(vector, torch.linspace(float(vector.min()), float(vector.max()), 2**bits))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kivi_keys_are_quantised_along_a_channel(x: torch.Tensor, bits: int) -> None:
    got = KIVIKeys(bits, group=32)(x)
    for head, group, channel in ((0, 0, 5), (1, 3, 40)):
        tokens = slice(32 * group, 32 * group + 32)
        want = min_max(x[0, head, tokens, channel], bits)
        torch.testing.assert_close(got[0, head, tokens, channel], want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_values_are_quantised_along_a_token(x: torch.Tensor, bits: int) -> None:
    got = KIVIValues(bits, group=32)(x)
    for token, group in ((0, 0), (77, 1)):
        channels = slice(32 * group, 32 * group + 32)
        want = min_max(x[0, 1, token, channels], bits)
        torch.testing.assert_close(got[0, 1, token, channels], want, rtol=2e-3, atol=5e-3)


def test_hadamard_int_is_uniform_after_a_rotation(x: torch.Tensor) -> None:
    got = HadamardInt(3)(x)
    rotated, levels = rotation_matrix(64) @ x[0, 1, 9], rotation_matrix(64) @ got[0, 1, 9]
    torch.testing.assert_close(levels, min_max(rotated, 3), rtol=2e-3, atol=2e-3)


def e4m3() -> torch.Tensor:
    """All finite values of the format: (1 + m/8) 2^(e-7), below it m/8 2^-6; 448 is the largest."""
    positive = [m / 8 * 2**-6 for m in range(8)]
    positive += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return torch.tensor(sorted({sign * value for sign in (1, -1) for value in positive}))


def test_fp8_takes_the_nearest_value_of_the_format(x: torch.Tensor) -> None:
    vector = x[0, 0, 3]
    scale = (vector.abs().max() / 448).bfloat16().float()
    torch.testing.assert_close(FP8()(x)[0, 0, 3], nearest_of(vector / scale, e4m3()) * scale)


def test_tile_scaling_forgives_a_loud_channel_and_a_loud_token() -> None:
    quiet = torch.randn(1, 1, 128, 64, generator=torch.Generator().manual_seed(1))
    loud = quiet.clone()
    loud[:, :, 7] *= 100

    def error(x: torch.Tensor) -> torch.Tensor:
        return (TileScaling(3)(x) - x)[:, :, 8:].square().mean()

    assert error(loud) < 1.1 * error(quiet)
    # What Lloyd-Max with 3 bits leaves of a Gaussian's variance is .0345.
    assert error(quiet) == pytest.approx(0.0345, rel=0.1)


@pytest.mark.parametrize("name", ["hadamard-int", "kivi", "tile-scaling"])
def test_more_bits_lose_less(x: torch.Tensor, name: str) -> None:
    def error(bits: int) -> float:
        codec = find_codec(f"{name}-{bits}")
        assert isinstance(codec, FakeQuantizedCodec)
        return sum(float((side(x) - x).square().mean()) for side in (codec.keys, codec.values))

    assert error(2) > 2.5 * error(3) > 6 * error(4) > 0


def test_bytes_of_a_known_shape() -> None:
    config = tiny_model("llama").config  # 4 layers, 2 KV heads of 64
    packed = 1024 - 4 - 96 - (1024 - 100) % 64
    plain = 2 * 4 * 2 * 64 * 2  # bytes a token: keys and values, layers, heads, channels, 16 bits
    kivi = 2 * 4 * 2 * 64 * (3 + 32 / 64) / 8
    assert find_codec("kivi-3").stored_bytes(config, 1024) == packed * kivi + (1024 - packed) * plain
    assert find_codec("fake-identity").stored_bytes(config, 1024) == 1024 * plain
    with pytest.raises(EvaluationError, match="group=7: expected a divisor of the head size 64"):
        find_codec("kivi-2:group=7").stored_bytes(config, 1024)
    assert find_codec("fp8").packed_length(1024) == (1024 - 100) // 32 * 32
    assert find_codec("compact").stored_bytes(config, 1024) == predict_bytes(config, "compact", 1024)
    rotation = 64 * 64 * 4
    packed = (1024 - 100) // 32 * 32
    hadamard = 2 * 4 * 2 * (64 * 2 / 8 + 4)
    expected = packed * hadamard + (1024 - packed) * plain + rotation
    assert find_codec("hadamard-int-2").stored_bytes(config, 1024) == expected


def test_what_leaves_the_window_is_replaced_and_nothing_else() -> None:
    config = tiny_model("llama").config
    codec = FakeQuantizedCodec("test", KIVIKeys(2, 32), KIVIValues(2, 32), sink_length=3, fewest_recent=10)
    cache = codec.cache(config)
    keys, values = random_kv(config, 1, 80)
    seen = cache.update(keys[:, :, :60], values[:, :, :60], 0)
    assert torch.equal(seen[0], keys[:, :, :60])  # a prompt sees itself as it is
    seen = cache.update(keys[:, :, 60:], values[:, :, 60:], 0)
    for got, want in zip(seen, (keys, values), strict=True):
        changed = (got != want).any(dim=-1)[0, 0]
        assert changed.nonzero().flatten().tolist() == list(range(3, 3 + 32))  # 80 - 3 - 10 is two blocks and a bit ...
    seen = cache.update(keys[:, :, :1], values[:, :, :1], 0)
    assert (seen[0][:, :, :80] != keys).any(dim=-1)[0, 0].sum() == 64  # ... but only 57 of them were there before


@pytest.mark.parametrize(
    "name",
    [
        "kivi-2:group=16,fewest_recent=20",
        "hadamard-int-2:fewest_recent=0",
        "plain-turboquant-2",
        "plain-turboquant-2:residual_length=32",
        "extreme:near_length=64",
        "balanced:k_bits=2,v_bits=2,near_length=32,near_bits=3,residual_length=64",
    ],
)
def test_a_chunk_sees_what_decoding_sees(name: str) -> None:
    """Fed in chunks, one by one, and at once: logits of a 2-bit codec agree for the first two alone."""
    model = tiny_model("qwen3")
    ids = random_tokens(1, 300)
    codec = find_codec(name)

    @torch.inference_mode()
    def last_logits(chunks: Iterable[tuple[int, int]]) -> torch.Tensor:
        cache = codec.cache(model.config)
        logits = [model(ids[:, start:stop], past_key_values=cache).logits for start, stop in chunks]
        return torch.cat(logits, dim=1)[:, 130:]

    one_by_one = last_logits((i, i + 1) for i in range(300))
    chunks = list(decoding_chunks(codec, 300, 16))
    assert len(chunks) < 30
    in_chunks = (last_logits(chunks) - one_by_one).abs().median()
    shifted = [(0, 9), *((start, min(start + 32, 300)) for start in range(9, 300, 32))]
    out_of_step = (last_logits(shifted) - one_by_one).abs().median()
    assert in_chunks < 0.02 * out_of_step  # rounding may move a number to the neighbouring level


@pytest.mark.parametrize("name", ["balanced", "paper", "kivi-2", "tile-scaling-2"])
@pytest.mark.parametrize("chunk", [1, 32])
def test_chunks_cover_everything_once(name: str, chunk: int) -> None:
    codec = find_codec(name)
    chunks = list(decoding_chunks(codec, 1000, chunk))
    assert chunks[0][0] == 0
    assert chunks[-1][1] == 1000
    assert all(before[1] == after[0] for before, after in pairwise(chunks))
    if chunk == 1:  # what the first and the last query of a chunk see is the same
        assert all(codec.seen(start + 1) == codec.seen(stop) for start, stop in chunks)


def test_every_codec_runs_on_a_model_and_knows_its_bytes() -> None:
    model = tiny_model("llama")
    ids = random_tokens(2, 300)
    uncompressed = find_codec("uncompressed").stored_bytes(model.config, 4096)
    with torch.inference_mode():
        want = model(ids).logits[:, 260:]
        for name in CODECS:
            codec = find_codec(name)
            if isinstance(codec, TransformersQuantizedCache) and codec.missing():
                assert "pip install" in str(codec.missing())
                continue
            cache = codec.cache(model.config)
            logits = [model(part, past_key_values=cache).logits for part in (ids[:, :260], ids[:, 260:])]
            exact = name in ("uncompressed", "identity", "fake-identity")
            assert torch.allclose(logits[1], want, atol=1e-3) == exact, name
            assert (codec.stored_bytes(model.config, 4096) < 0.6 * uncompressed) != exact, name


def test_a_codec_is_named_with_fields() -> None:
    codec = find_codec("balanced:k_bits=3,center_keys=false")
    assert codec.name == "balanced:k_bits=3,center_keys=false"
    assert codec.kv_cache == TurboQuantConfig(k_bits=3, center_keys=False)  # type: ignore[attr-defined]
    assert find_codec("kivi-2:group=32").packed_length(1000) == (1000 - 100) // 32 * 32
    plain = find_codec("plain-turboquant-2").kv_cache  # type: ignore[attr-defined]
    assert (plain.k_bits, plain.v_bits, plain.scale, plain.residual_length) == (2, 2, "norm", 128)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("balanse", "did you mean 'balanced'"),
        ("balanced:k_bits", "name=value"),
        ("kivi-2:groups=32", "no such field"),
        ("balanced:k_bits=5", "k_bits=5"),
        ("balanced:bits=4", "no such field"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises((EvaluationError, ConfigError), match=message):
        find_codec(text)


def test_a_missing_package_is_named() -> None:
    codec = TransformersQuantizedCache("quanto-4", "quanto", 4)
    if codec.missing():
        with pytest.raises(RuntimeError, match="pip install optimum-quanto"):
            codec.cache(tiny_model("llama").config)
    else:
        assert codec.cache(tiny_model("llama").config).get_seq_length() == 0
