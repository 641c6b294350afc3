"""What the tests of the cache share."""

from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache

from turboquant_local.kernels.layout import KVView


def _shown(view: KVView) -> torch.Tensor:
    parts = [view.sinks]
    for part in view.packed:
        scales = part.scale_values()
        levels = part.quantizer.levels(part.codes)
        parts.append(levels if scales is None else levels * scales.unsqueeze(-1))
    return torch.cat([*parts, view.recent], dim=2)


@pytest.fixture(scope="session")
def stored() -> Callable[[DynamicCache, int], list[torch.Tensor]]:
    """What a compressed layer stores of its keys and values, token by token.

    Packed tokens stay rotated: turning them back rounds otherwise in other numbers of rows, and codes are to be
    compared to the bit.
    """
    return lambda cache, layer=0: [_shown(cache.layers[layer]._k), _shown(cache.layers[layer]._v)]
