"""Packed keys and values of any shape, queries, and attention over them in float64."""

from dataclasses import replace

import pytest
import torch

from turboquant_local.cache import storage
from turboquant_local.cache.storage import make_codec
from turboquant_local.config import CodebookName, TurboQuantConfig
from turboquant_local.kernels.layout import KVView

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case:
    """What the tests of attention are made of; tensors on the GPU where there is one."""

    device = DEVICE

    @staticmethod
    def view(x: torch.Tensor, bits: int, keys: bool = False, codebook: CodebookName = "grid") -> KVView:
        """Sinks, far and near tokens and window of what was appended to an empty cache."""
        config = TurboQuantConfig(
            sink_length=3, residual_length=20, near_length=32, codebook=codebook, error_feedback=codebook == "grid"
        )
        whole = storage.append(storage.empty(x), x)
        return storage.settle([whole], config, make_codec(config, x.shape[-1], bits, keys))[0]

    def views(
        self,
        tokens: int,
        heads: int,
        k_dim: int,
        v_dim: int,
        k_bits: int = 4,
        v_bits: int = 4,
        dtype: torch.dtype = torch.float32,
        batch: int = 2,
        codebook: CodebookName = "grid",
    ) -> tuple[KVView, KVView]:
        """Random keys, with a bias and centred, and values."""
        generator = torch.Generator().manual_seed(0)
        k = torch.randn(batch, heads, tokens, k_dim, generator=generator) + 2 * torch.randn(k_dim, generator=generator)
        v = torch.randn(batch, heads, tokens, v_dim, generator=generator)
        keys = self.view(k.to(DEVICE, dtype), k_bits, keys=True, codebook=codebook)
        return keys, self.view(v.to(DEVICE, dtype), v_bits, codebook=codebook)

    @staticmethod
    def queries(
        heads: int, length: int, head_dim: int, dtype: torch.dtype = torch.float32, batch: int = 2
    ) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, heads, length, head_dim, generator=generator).to(DEVICE, dtype)

    @staticmethod
    def causal(q_length: int, kv_length: int) -> torch.Tensor:
        return torch.ones(q_length, kv_length, dtype=torch.bool, device=DEVICE).tril(kv_length - q_length)

    @staticmethod
    def exact(
        query: torch.Tensor,
        keys: KVView,
        values: KVView,
        visible: torch.Tensor,
        softcap: float | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention in float64 over the decompressed tensors."""

        def whole(side: KVView) -> torch.Tensor:
            wide = replace(side, sinks=side.sinks.float(), recent=side.recent.float())
            return storage.dequantize(wide).double().repeat_interleave(query.shape[1] // side.shape[1], 1)

        scores = query.double() @ whole(keys).mT * query.shape[-1] ** -0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, -torch.inf)
        if sink_logits is not None:
            column = sink_logits.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ whole(values)
        return scores.softmax(-1) @ whole(values)

    def of(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, KVView, KVView, torch.Tensor]:
        """The last queries of a sequence, its keys and values, and attention over them."""
        q_heads, heads, q_length, tokens, k_dim, v_dim, k_bits, v_bits = shape
        keys, values = self.views(tokens, heads, k_dim, v_dim, k_bits, v_bits, dtype)
        query = self.queries(q_heads, q_length, k_dim, dtype)
        return query, keys, values, self.exact(query, keys, values, self.causal(q_length, tokens))

    @staticmethod
    def error(out: torch.Tensor, truth: torch.Tensor) -> float:
        assert out.isfinite().all()
        return ((out.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


@pytest.fixture(scope="session")
def case() -> Case:
    return Case()


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that kernels are to write holds NaN before."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(0xA5 if x.dtype == torch.uint8 else -1)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poisoned(empty(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poisoned(new_empty(*args, **kwargs)))
