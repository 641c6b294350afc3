"""The mathematics of TurboQuant (arXiv 2504.19874) in plain torch; runs on a CPU."""

from turboquant_local.codec.codebook import Codebook, lloyd_max
from turboquant_local.codec.inner_product import ProductCodes, ProductQuantizer
from turboquant_local.codec.mixed import MixedCodes, MixedQuantizer
from turboquant_local.codec.packing import pack_codes, unpack_codes
from turboquant_local.codec.quantizer import IdentityQuantizer, MSEQuantizer, Quantizer
from turboquant_local.codec.rotation import rotation_matrix

__all__ = [
    "Codebook",
    "IdentityQuantizer",
    "MSEQuantizer",
    "MixedCodes",
    "MixedQuantizer",
    "ProductCodes",
    "ProductQuantizer",
    "Quantizer",
    "lloyd_max",
    "pack_codes",
    "rotation_matrix",
    "unpack_codes",
]
