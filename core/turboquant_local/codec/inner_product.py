"""TurboQuant's inner-product quantizer: a code of the vector, and a 1-bit sketch of what the code missed.

Not used in the cache. The estimate of every score is unbiased but noisy, and softmax turns noise in the scores into
error: on GPT-2 at 3 bits a measurement found perplexity +300 % where the MSE quantizer had +7.6 %
(github.com/TheTom/turboquant_plus/issues/45). `MSEQuantizer` with its "unbiased" scale needs no sketch to lose the
bias. The sketch serves where single inner products are averaged or compared, as in vector search.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from turboquant_local.codec.packing import pack_codes, packed_size, unpack_codes
from turboquant_local.codec.quantizer import MSEQuantizer
from turboquant_local.codec.rotation import rotation_matrix
from turboquant_local.codec.scales import half_scales
from turboquant_local.codec.shared import shared
from turboquant_local.config import Rotation
from turboquant_local.errors import ConfigError


@dataclass(frozen=True)
class ProductCodes:
    """Vectors as `ProductQuantizer` stores them; the tensors' bytes are all there is.

    Attributes:
        sketch: `[..., tokens, head_dim / 8]` uint8, the signs of the sketched residual (1 for 0 and above).
        residual_norm: `[..., tokens]` float16, |x - x̂| for the x̂ that codes and scale give.
        codes: `[..., tokens, head_dim * (bits - 1) / 8]` uint8, or None at 1 bit.
        scale: `[..., tokens]` float16, |x|, or None at 1 bit.
    """

    sketch: torch.Tensor
    residual_norm: torch.Tensor
    codes: torch.Tensor | None
    scale: torch.Tensor | None


@dataclass(frozen=True)
class ProductQuantizer:
    """TurboQuant_prod (paper, Algorithm 2): the MSE code at one bit less, and QJL of the residual (arXiv 2406.03482).

    For a residual r and a matrix S of standard Gaussian entries, E[S' sign(S r)] = sqrt(2 / π) head_dim r / |r|. So the
    estimate of <q, x> is unbiased over the draw of S, for any q and x. Its variance is at most
    π / (2 head_dim) |q|^2 |r|^2. With one S the errors of many vectors are not independent of each other.

    Attributes:
        head_dim: Size of the vectors, a multiple of 8.
        bits: Bits a coordinate, 1 to 8: bits - 1 of code and 1 of sketch.
        rotation: Kind of rotation of the MSE code.
        seed: Seed of the rotation and of the sketch.

    Raises:
        ConfigError: A bit count outside the range, or a head size that cannot be packed or rotated this way.
    """

    head_dim: int
    bits: int
    rotation: Rotation = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits}: expected 1 to 8, one of them for the sketch")
        packed_size(self.head_dim, self.bits)
        rotation_matrix(self.head_dim, self.rotation, self.seed)

    @property
    def bytes_per_vector(self) -> int:
        """Bytes stored for a vector: sketch, codes, and one or two norms in float16."""
        return packed_size(self.head_dim, self.bits) + (2 if self.bits == 1 else 4)

    @property
    def _coarse(self) -> MSEQuantizer:
        """The first stage; at 1 bit only its rotation is used."""
        return MSEQuantizer(self.head_dim, max(1, self.bits - 1), self.rotation, "norm", self.seed)

    def quantize(self, x: torch.Tensor) -> ProductCodes:
        """Quantise vectors.

        Args:
            x: `[..., tokens, head_dim]`, any float dtype, norms up to 65504.
        """
        residual, codes, scale = self._coarse.rotate(x), None, None
        if self.bits > 1:
            codes, norm = self._coarse.encode(residual)
            scale = half_scales(norm)
            residual = residual - self._approximation(codes, scale)  # of the rounded scale: the sketch mends it too
        signs = residual @ _sketch_matrix(self, x.device).T >= 0
        return ProductCodes(pack_codes(signs.to(torch.uint8), 1), half_scales(residual.norm(dim=-1)), codes, scale)

    def inner_product(self, query: torch.Tensor, codes: ProductCodes) -> torch.Tensor:
        """Estimates of <q, x> for every query and vector, without rebuilding the vectors.

        Args:
            query: `[..., queries, head_dim]`, any float dtype.
            codes: Of vectors `[..., tokens, head_dim]`.

        Returns:
            `[..., queries, tokens]` float32.
        """
        q = self._coarse.rotate(query)
        sketched = q @ _sketch_matrix(self, q.device).T
        estimate = (sketched @ _signs(codes.sketch).mT) * self._gain(codes).unsqueeze(-2)
        if codes.codes is None or codes.scale is None:
            return estimate
        return estimate + q @ self._approximation(codes.codes, codes.scale).mT

    def dequantize(self, codes: ProductCodes) -> torch.Tensor:
        """Vectors `[..., tokens, head_dim]` float32 whose inner products with any query are those estimates.

        As vectors they are worse than those of an MSE quantizer of equal bits: unbiased, but with more error.
        """
        sketch = _signs(codes.sketch) @ _sketch_matrix(self, codes.sketch.device)
        y = sketch * self._gain(codes).unsqueeze(-1)
        if codes.codes is not None and codes.scale is not None:
            y = y + self._approximation(codes.codes, codes.scale)
        return self._coarse.unrotate(y)

    def _approximation(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """What the first stage alone knows, in rotated space."""
        return self._coarse.levels(codes) * scale.float().unsqueeze(-1)

    def _gain(self, codes: ProductCodes) -> torch.Tensor:
        """Factor of the sketch of every vector (paper, Algorithm 2): sqrt(π / 2) / head_dim |r|."""
        return codes.residual_norm.float() * (math.sqrt(math.pi / 2) / self.head_dim)


def _signs(sketch: torch.Tensor) -> torch.Tensor:
    """-1 and 1 for the bits of a sketch: `[..., head_dim]` float32."""
    return unpack_codes(sketch, 1).float() * 2 - 1


@shared
def _sketch_matrix(quantizer: ProductQuantizer, device: torch.device) -> torch.Tensor:
    """S: independent standard Gaussian entries, from Python's own generator as in `codec.rotation`.

    It acts on rotated vectors, where the paper's acts on plain ones; its distribution is the same in both. The seed is
    a string, so that a dense rotation of the same number is not made of the same draws.
    """
    size = quantizer.head_dim
    generator = random.Random(f"sketch {quantizer.seed}")
    entries = [generator.gauss(0.0, 1.0) for _ in range(size * size)]
    return torch.tensor(entries, dtype=torch.float32).view(size, size).to(device)
