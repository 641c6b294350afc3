import math

import pytest
import torch

from turboquant_local.codec import lloyd_max
from turboquant_local.errors import ConfigError

# The exact Beta optimum at head_dim 128 and 64; the paper's table rounds the Gaussian limit (0.36, 0.117, 0.03, 0.009).
OPTIMUM = {(128, 1): 0.361, (128, 2): 0.116, (128, 3): 0.0339, (128, 4): 0.0093, (64, 3): 0.0334, (64, 4): 0.0091}


@pytest.mark.parametrize(("head_dim", "bits"), OPTIMUM)
def test_error_is_the_optimum(head_dim: int, bits: int) -> None:
    assert lloyd_max(head_dim, bits).mse == pytest.approx(OPTIMUM[head_dim, bits], rel=0.005)


@pytest.mark.parametrize("bits", range(1, 9))
def test_error_is_below_the_papers_bound(bits: int) -> None:
    assert lloyd_max(128, bits).mse < math.sqrt(3) * math.pi / 2 * 4.0**-bits


def test_large_heads_approach_the_gaussian() -> None:
    assert lloyd_max(8192, 4).mse == pytest.approx(0.009501, rel=0.002)
    assert lloyd_max(8192, 1).mse == pytest.approx(1 - 2 / math.pi, rel=0.001)


def test_four_coordinates_at_one_bit_in_closed_form() -> None:
    # head_dim 5 has density (3/4)(1 - t^2): the mean of its positive half is 3/8.
    assert lloyd_max(5, 1).centroids.tolist() == pytest.approx([-0.375, 0.375])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_centroids_are_the_means_of_their_cells(bits: int) -> None:
    book = lloyd_max(64, bits)
    t = torch.linspace(-1, 1, 2_000_001, dtype=torch.float64)
    weight = (1 - t.square()).clamp_min(0) ** ((64 - 3) / 2)
    cell = torch.bucketize(t, book.boundaries)
    mass = torch.zeros(2**bits, dtype=torch.float64).index_add_(0, cell, weight)
    mean = torch.zeros(2**bits, dtype=torch.float64).index_add_(0, cell, weight * t) / mass
    assert torch.allclose(mean, book.centroids, atol=3e-6)
    assert torch.equal(book.centroids, -book.centroids.flip(0))
    assert torch.equal(book.centroids, book.centroids.sort().values)


@pytest.mark.parametrize(("head_dim", "bits", "name"), [(128, 0, "bits=0"), (128, 9, "bits=9"), (3, 4, "head_dim=3")])
def test_refuses_what_has_no_codebook(head_dim: int, bits: int, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        lloyd_max(head_dim, bits)
