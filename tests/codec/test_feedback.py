"""Error feedback: the error that queries feel, against float64 and against plain rounding."""

import pytest
import torch

from turboquant_local.codec import MSEQuantizer, rotation_matrix
from turboquant_local.codec.feedback import feedback_codes


def vectors(count: int, head_dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, head_dim, generator=torch.Generator().manual_seed(seed))


def uneven(head_dim: int) -> torch.Tensor:
    """Weights from 0.1 to 4, mean about 1.3."""
    return torch.logspace(-1, 0.6, head_dim).view(1, 1, head_dim)


def felt(error: torch.Tensor, weights: torch.Tensor) -> float:
    return (error.square() * weights).sum(-1).mean().item()


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_queries_feel_less_error(bits: int, head_dim: int) -> None:
    """By the high-rate bound, the geometric against the arithmetic mean of the weights (1.93 here), at most."""
    x, weights = vectors(4000, head_dim).unsqueeze(0), uneven(head_dim)
    quantizer = MSEQuantizer(head_dim, bits)
    plain = felt(quantizer.dequantize(*quantizer.quantize(x)) - x, weights)
    ours = felt(quantizer.dequantize(*quantizer.quantize(x, weights)) - x, weights)
    bound = (weights.mean() / weights.log().mean().exp()).item()
    assert 1.25 < plain / ours < bound * 1.02


def test_even_weights_change_nothing() -> None:
    x = vectors(300, 64).unsqueeze(0)
    quantizer = MSEQuantizer(64, 3)
    (codes, scales), (plain, plain_scales) = quantizer.quantize(x, torch.full((1, 1, 64), 0.7)), quantizer.quantize(x)
    assert (codes != plain).float().mean() < 1e-3  # the factor's zeros are only zero to rounding
    torch.testing.assert_close(scales, plain_scales, rtol=1e-3, atol=0)


def test_inner_products_keep_slope_one_for_queries_of_that_profile() -> None:
    x, weights = vectors(20_000, 128).unsqueeze(0), uneven(128)
    q = vectors(20_000, 128, seed=1) * weights[0].sqrt() + 0.5 * weights[0] * x[0]
    shown = MSEQuantizer(128, 3).dequantize(*MSEQuantizer(128, 3).quantize(x, weights))[0]
    truth, seen = (q * x[0]).sum(-1).double(), (q * shown).sum(-1).double()
    assert (truth @ seen / (truth @ truth)).item() == pytest.approx(1.0, abs=0.005)


def test_heads_are_coded_together_as_alone() -> None:
    x = vectors(60, 64).view(2, 30, 64)
    weights = torch.stack([uneven(64), uneven(64).flip(-1)]).view(2, 1, 64)
    codes, _ = MSEQuantizer(64, 3).quantize(x, weights)
    alone = torch.stack([MSEQuantizer(64, 3).quantize(x[i], weights[i])[0] for i in range(2)])
    assert (codes == alone).all(-1).float().mean() > 0.95


def test_panels_equal_the_plain_recursion() -> None:
    """One coordinate after the other in float64: target = x minus what the errors before it leave to mend."""
    rotation, weights = rotation_matrix(48), uneven(48)
    quantizer = MSEQuantizer(48, 3)
    _, centroids, boundaries = quantizer.constants(torch.device("cpu"))[:3]
    y = torch.nn.functional.normalize(vectors(50, 48), dim=-1) @ rotation.T

    def nearest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.bucketize(x, boundaries, out_int32=True)
        return codes, centroids[codes]

    codes, levels = (part[0] for part in feedback_codes(y.unsqueeze(0), nearest, weights, rotation))
    assert torch.equal(levels, centroids[codes])
    inverse = torch.linalg.inv(rotation.double() @ torch.diag(weights.flatten().double()) @ rotation.double().T)
    upper = torch.linalg.cholesky(inverse, upper=True)
    target = y.double()
    expected = torch.empty_like(codes)
    for i in range(48):
        expected[:, i] = torch.bucketize(target[:, i].contiguous(), boundaries.double(), out_int32=True)
        error = (target[:, i] - centroids.double()[expected[:, i]]) / upper[i, i]
        target = target - error[:, None] * upper[i].where(torch.arange(48) > i, 0.0)
    assert (codes == expected).all(dim=-1).float().mean() > 0.95  # a tie decided otherwise changes what follows
