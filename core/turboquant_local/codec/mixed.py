"""Mixed precision: channels that are larger than the others get more bits.

Not used in the cache: there, an error in a channel counts as much as queries feel it, which `codec.feedback` puts into
the choice of the codes without a second scale or another layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turboquant_local.codec.packing import pack_codes, packed_size, unpack_codes
from turboquant_local.codec.quantizer import MSEQuantizer
from turboquant_local.codec.rotation import rotation_matrix
from turboquant_local.codec.scales import half_scales
from turboquant_local.config import Rotation, Scale
from turboquant_local.errors import ConfigError


@dataclass(frozen=True)
class MixedCodes:
    """Vectors as `MixedQuantizer` stores them; the tensors' bytes are all there is.

    Attributes:
        outliers: `[..., 1, head_dim / 8]` uint8, one bit a channel: the channel index, once a head.
        high_codes: `[..., tokens, num_outliers * high_bits / 8]` uint8.
        high_scale: `[..., tokens]` float16.
        low_codes: `[..., tokens, (head_dim - num_outliers) * low_bits / 8]` uint8.
        low_scale: `[..., tokens]` float16.
    """

    outliers: torch.Tensor
    high_codes: torch.Tensor
    high_scale: torch.Tensor
    low_codes: torch.Tensor
    low_scale: torch.Tensor


@dataclass(frozen=True)
class MixedQuantizer:
    """Two independent TurboQuant instances: a head's outlier channels, and the rest (paper, Section 4.3).

    The paper's 2.5 bits are 32 of 128 channels at 3 bits and 96 at 2, its 3.5 bits the same at 4 and 3. Codes alone
    are then 2.25 and 3.25 bits a coordinate; the two 16-bit scales of a vector bring them to 2.5 and 3.5.

    It pays where outliers carry much of the norm. On vectors with even channels it has more error than one instance
    of as many bits.

    Attributes:
        head_dim: Size of the vectors.
        high_bits: Bits a coordinate in outlier channels, 1 to 8.
        low_bits: Bits a coordinate in the others.
        num_outliers: Outlier channels of a head, a multiple of 8, as is head_dim.
        rotation: Kind of both rotations.
        scale: As in `MSEQuantizer`, for each group by itself.
        seed: Seed of the rotations; they differ from each other.

    Raises:
        ConfigError: Groups that cannot be packed or rotated this way.
    """

    head_dim: int
    high_bits: int = 3
    low_bits: int = 2
    num_outliers: int = 32
    rotation: Rotation = "auto"
    scale: Scale = "unbiased"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.num_outliers < self.head_dim or self.num_outliers % 8:
            raise ConfigError(
                f"num_outliers={self.num_outliers}: expected a multiple of 8 below head_dim={self.head_dim}; for one "
                "group of channels use MSEQuantizer"
            )
        packed_size(self.head_dim, 1)
        for name, bits in (("high_bits", self.high_bits), ("low_bits", self.low_bits)):
            if not 1 <= bits <= 8:
                raise ConfigError(f"{name}={bits}: expected 1 to 8")
        for size in (self.num_outliers, self.head_dim - self.num_outliers):
            rotation_matrix(size, self.rotation, self.seed)

    @property
    def bits(self) -> float:
        """Bits of code a coordinate, on average."""
        rest = self.head_dim - self.num_outliers
        return (self.num_outliers * self.high_bits + rest * self.low_bits) / self.head_dim

    @property
    def stored_bits(self) -> float:
        """Bits a coordinate with both scales; the channel index, once a head, is not in it."""
        return self.bytes_per_vector * 8 / self.head_dim

    @property
    def bytes_per_vector(self) -> int:
        """Bytes stored for a vector: codes, and two scales in float16."""
        rest = self.head_dim - self.num_outliers
        return packed_size(self.num_outliers, self.high_bits) + packed_size(rest, self.low_bits) + 4

    @property
    def _high(self) -> MSEQuantizer:
        return MSEQuantizer(self.num_outliers, self.high_bits, self.rotation, self.scale, self.seed + 1)

    @property
    def _low(self) -> MSEQuantizer:
        rest = self.head_dim - self.num_outliers
        return MSEQuantizer(rest, self.low_bits, self.rotation, self.scale, self.seed)

    def outlier_channels(self, sample: torch.Tensor) -> torch.Tensor:
        """The channels of largest L2 norm in each head.

        Args:
            sample: `[..., tokens, head_dim]`.

        Returns:
            `[..., 1, head_dim]` bool, `num_outliers` of them True in each head.
        """
        norms = sample.float().norm(dim=-2, keepdim=True)
        largest = norms.topk(self.num_outliers).indices
        return torch.zeros_like(norms, dtype=torch.bool).scatter(-1, largest, True)

    def quantize(self, x: torch.Tensor, outliers: torch.Tensor) -> MixedCodes:
        """Quantise vectors.

        Args:
            x: `[..., tokens, head_dim]`, any float dtype.
            outliers: `[..., 1, head_dim]` bool, as from `outlier_channels`.

        Raises:
            ConfigError: A head without exactly `num_outliers` outliers.
        """
        counts = outliers.sum(-1)
        if (counts != self.num_outliers).any():
            raise ConfigError(
                f"outliers: expected {self.num_outliers} True channels in each head, got {counts.unique().tolist()}; "
                "take them from outlier_channels()"
            )
        ordered = x.gather(-1, _order(outliers).expand(x.shape))
        high, low = ordered.split([self.num_outliers, self.head_dim - self.num_outliers], -1)
        high_codes, high_scale = self._high.quantize(high)
        low_codes, low_scale = self._low.quantize(low)
        index = pack_codes(outliers.to(torch.uint8), 1)
        return MixedCodes(index, high_codes, half_scales(high_scale), low_codes, half_scales(low_scale))

    def dequantize(self, codes: MixedCodes) -> torch.Tensor:
        """The vectors that the codes stand for: `[..., tokens, head_dim]` float32."""
        high = self._high.dequantize(codes.high_codes, codes.high_scale)
        low = self._low.dequantize(codes.low_codes, codes.low_scale)
        ordered = torch.cat([high, low], -1)
        back = _order(unpack_codes(codes.outliers, 1)).argsort(-1)
        return ordered.gather(-1, back.expand(ordered.shape))


def _order(outliers: torch.Tensor) -> torch.Tensor:
    """Channel numbers, outliers first, each group in its own order."""
    return outliers.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
