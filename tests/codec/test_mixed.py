"""Mixed precision: the right channels, the bytes it says, and less error where channels are uneven."""

import dataclasses

import pytest
import torch

from turboquant_local.codec import MixedQuantizer, MSEQuantizer
from turboquant_local.errors import ConfigError

OUTLIERS = torch.randperm(128, generator=torch.Generator().manual_seed(9))[:64].view(2, 32)  # of two heads


def keys(outlier: float, count: int = 4000) -> torch.Tensor:
    """`[2, tokens, 128]`: Gaussian, with 32 channels of each head `outlier` times as large as the others."""
    sizes = torch.ones(2, 1, 128).scatter(-1, OUTLIERS[:, None], outlier)
    return torch.randn(2, count, 128, generator=torch.Generator().manual_seed(0)) * sizes


def relative_error(shown: torch.Tensor, x: torch.Tensor) -> float:
    return ((shown - x).square().sum() / x.square().sum()).item()


def mixed_error(quantizer: MixedQuantizer, x: torch.Tensor) -> float:
    codes = quantizer.quantize(x, quantizer.outlier_channels(x[:, :128]))
    return relative_error(quantizer.dequantize(codes), x)


def uniform_error(bits: float, x: torch.Tensor) -> float:
    """One instance at two whole numbers of bits, each for such a share of the vectors that all scales are paid."""
    low, stored = int(bits), bits - 16 / 128
    errors = []
    for whole in (low, low + 1):
        quantizer = MSEQuantizer(128, whole)
        codes, scale = quantizer.quantize(x)
        errors.append(relative_error(quantizer.dequantize(codes, scale.half()), x))
    share = stored - low
    return (1 - share) * errors[0] + share * errors[1]


@pytest.mark.parametrize(("high", "low", "bits"), [(3, 2, 2.5), (4, 3, 3.5)])
def test_less_error_than_uniform_at_equal_bits(high: int, low: int, bits: float) -> None:
    quantizer = MixedQuantizer(128, high, low)
    assert quantizer.stored_bits == bits
    x = keys(outlier=4)
    assert mixed_error(quantizer, x) < 0.52 * uniform_error(bits, x)
    # And it costs, where there are none: the comparison is not won by counting alone.
    even = keys(outlier=1)
    assert mixed_error(quantizer, even) > uniform_error(bits, even)


def test_finds_the_outliers_of_each_head() -> None:
    found = MixedQuantizer(128).outlier_channels(keys(outlier=4, count=64))
    assert found.shape == (2, 1, 128)
    assert [set(head.flatten().nonzero().flatten().tolist()) for head in found] == [set(o.tolist()) for o in OUTLIERS]


def test_channels_come_back_in_their_places() -> None:
    quantizer = MixedQuantizer(128, 8, 8)
    x = keys(outlier=20, count=50)
    shown = quantizer.dequantize(quantizer.quantize(x, quantizer.outlier_channels(x)))
    assert relative_error(shown, x) < 1e-4


@pytest.mark.parametrize(
    ("quantizer", "bits", "vector", "head"),
    [
        (MixedQuantizer(128, 3, 2), 2.25, 40, 16),
        (MixedQuantizer(128, 4, 3), 3.25, 56, 16),
        (MixedQuantizer(64, 4, 2, num_outliers=16), 2.5, 24, 8),
    ],
)
def test_stores_what_it_says(quantizer: MixedQuantizer, bits: float, vector: int, head: int) -> None:
    assert (quantizer.bits, quantizer.bytes_per_vector) == (bits, vector)
    x = torch.randn(3, 2, 10, quantizer.head_dim, generator=torch.Generator().manual_seed(0))
    codes = quantizer.quantize(x, quantizer.outlier_channels(x))
    stored = sum(getattr(codes, field.name).nbytes for field in dataclasses.fields(codes))
    assert stored == 6 * head + 60 * vector


def test_groups_of_equal_size_are_rotated_differently() -> None:
    quantizer = MixedQuantizer(128, 1, 1, num_outliers=64)
    half = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
    outliers = torch.arange(128).lt(64)[None, None]
    codes = quantizer.quantize(torch.cat([half, half], -1), outliers)
    assert not torch.equal(codes.high_codes, codes.low_codes)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"num_outliers": 0}, "num_outliers=0"),
        ({"num_outliers": 128}, "num_outliers=128"),
        ({"num_outliers": 30}, "num_outliers=30"),
        ({"high_bits": 9}, "high_bits=9"),
        ({"low_bits": 0}, "low_bits=0"),
    ],
)
def test_refuses_what_it_cannot_store(fields: dict[str, int], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        MixedQuantizer(128, **fields)


def test_refuses_another_number_of_outliers() -> None:
    with pytest.raises(ConfigError, match=r"outliers: expected 32 True channels in each head, got \[128\]"):
        MixedQuantizer(128).quantize(keys(1, 1), torch.ones(2, 1, 128, dtype=torch.bool))
