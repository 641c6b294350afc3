import torch

from turboquant_local.codec.centering import key_mean


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
