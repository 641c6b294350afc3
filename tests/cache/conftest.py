"""What the tests of the cache share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from turboquant_local.kernels.layout import KVView


def _shown(view: KVView) -> torch.Tensor:
    parts = [pad(view.sinks, (0, 1), value=1.0)]
    for part in view.packed:
        levels = part.quantizer.levels(part.codes)
        scales = torch.ones(levels.shape[:-1]) if part.scales is None else part.scales.float()
        parts.append(torch.cat([levels, scales.unsqueeze(-1)], dim=-1))
    return torch.cat([*parts, pad(view.recent, (0, 1), value=1.0)], dim=2)


@pytest.fixture(scope="session")
def stored() -> Callable[[DynamicCache, int], list[torch.Tensor]]:
    """What a compressed layer stores of its keys and values, token by token: the vector, and its scale as stored.

    Packed tokens stay rotated and without scale: what is computed from codes rounds otherwise in other numbers of rows,
    and codes are to be compared to the bit. The scale of an unpacked token is 1.
    """
    return lambda cache, layer=0: [_shown(cache.layers[layer]._k), _shown(cache.layers[layer]._v)]


@pytest.fixture
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
