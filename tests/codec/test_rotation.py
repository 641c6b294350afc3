import pytest
import torch

from turboquant_local.codec import rotation_matrix
from turboquant_local.errors import ConfigError


@pytest.mark.parametrize("head_dim", [8, 12, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", ["auto", "dense"])
def test_is_orthogonal(head_dim: int, kind: str) -> None:
    matrix = rotation_matrix(head_dim, kind).double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(head_dim, dtype=torch.float64), atol=1e-5)


def test_the_seed_decides_and_nothing_else_does() -> None:
    expected = rotation_matrix(64, "hadamard", 3).clone()
    rotation_matrix.cache_clear()
    torch.manual_seed(1)
    assert torch.equal(rotation_matrix(64, "hadamard", 3), expected)
    assert not torch.equal(rotation_matrix(64, "hadamard", 4), expected)
    # Pinned: stored codes would be read wrongly if a new version made another matrix of the same seed.
    assert (rotation_matrix(8, "hadamard", 0)[0] * 4).round().tolist() == PINNED_ROW


PINNED_ROW = [-1.0, 1.0, 1.0, 1.0, 1.0, -1.0, 1.0, 3.0]


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_two_rounds_spread_a_single_spike(head_dim: int) -> None:
    matrix = rotation_matrix(head_dim)
    spikes = matrix.T  # images of the unit vectors
    assert spikes.abs().max() < 6 / head_dim**0.5
    assert (spikes.abs() * head_dim**0.5).std() > 0.3  # one round alone would leave all magnitudes equal


def test_says_which_head_sizes_have_a_hadamard_matrix() -> None:
    with pytest.raises(
        ConfigError, match=r"head_dim=80: rotation='hadamard' needs 2\^k or 3\*2\^k; use rotation='dense'"
    ):
        rotation_matrix(80, "hadamard")
    with pytest.raises(ConfigError, match="head_dim=0"):
        rotation_matrix(0)
