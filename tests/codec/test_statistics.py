import pytest
import torch

from turboquant_local.codec.statistics import channel_weights, head_statistics, key_mean, typical_norm


def keys() -> torch.Tensor:
    return torch.randn(2, 3, 128, 16, generator=torch.Generator().manual_seed(0))


def test_a_strong_bias_is_found_and_noise_is_left_alone() -> None:
    bias = torch.zeros(16)
    bias[5], bias[9] = 80.0, -30.0
    mean = key_mean(keys() + bias)
    assert mean.shape == (2, 3, 1, 16)
    assert torch.allclose(mean[..., [5, 9]], bias[[5, 9]].expand(2, 3, 1, 2), atol=0.5)
    rest = [channel for channel in range(16) if channel not in (5, 9)]
    assert mean[..., rest].abs().max() < 0.03  # a plain mean of 128 reaches 0.3


def test_constant_and_zero_channels() -> None:
    constant = torch.zeros(1, 1, 10, 8, dtype=torch.bfloat16)
    constant[..., 3] = 2.5
    mean = key_mean(constant)
    assert mean.dtype == torch.bfloat16
    assert mean.flatten().tolist() == [0, 0, 0, 2.5, 0, 0, 0, 0]


def test_channel_weights_follow_the_spread_of_rotary_pairs() -> None:
    x = keys()
    x[..., 3] *= 2.0  # variance 4, its pair's stays 1
    x[..., 5] += 100.0  # a bias is no spread
    weights = channel_weights(x)
    assert weights.shape == (2, 3, 1, 16)
    assert torch.equal(weights[..., :8], weights[..., 8:])
    assert torch.allclose(weights.mean(-1), torch.tensor(1.1), atol=0.01)
    assert (weights[..., 3] > 1.7 * weights[..., [0, 1, 2, 4, 5, 6, 7]].mean(-1)).all()


def test_channel_weights_are_bounded() -> None:
    x = keys()
    x[..., 0] *= 1000.0
    x[..., [1, 9]] = 0.0
    weights = channel_weights(x)
    assert weights.max() == pytest.approx(4.1)
    assert weights.min() == pytest.approx(0.1)
    assert torch.equal(channel_weights(torch.zeros(1, 1, 5, 8)), torch.full((1, 1, 1, 8), 0.1))


def test_statistics_are_taken_as_asked() -> None:
    x = keys() * 3
    nothing = head_statistics(x, center=False, weigh=False, unit=False)
    assert (nothing.mean, nothing.weights, nothing.scale_unit) == (None, None, None)
    everything = head_statistics(x + 50, center=True, weigh=True, unit=True)
    assert everything.scale_unit.shape == (2, 3, 1)
    assert torch.allclose(
        everything.scale_unit, torch.tensor(3 * 16**0.5), rtol=0.1
    )  # of what is left without the mean


def test_two_tokens_among_padding_set_the_unit_of_scales() -> None:
    sample = torch.full((1, 1, 128, 16), 1e-3)
    sample[:, :, -2:] = keys()[:1, :1, :2]
    true_norm = keys()[:1, :1].norm(dim=-1).mean()
    assert true_norm / 10 < typical_norm(sample) < true_norm


def test_without_any_norm_the_unit_is_that_of_normal_vectors() -> None:
    assert typical_norm(torch.zeros(2, 1, 128, 64)).tolist() == [[[8.0]], [[8.0]]]
