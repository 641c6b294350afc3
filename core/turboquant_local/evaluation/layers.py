"""Layer by layer: how true keys and values come back, how far attention moves, and what is really stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from turboquant_local.attention import turboquant_attention
from turboquant_local.cache import TurboQuantCache
from turboquant_local.cache.accounting import report
from turboquant_local.cache.handle import KVHandle
from turboquant_local.cache.layer import CompressedLayer
from turboquant_local.evaluation.attention_switch import attention
from turboquant_local.evaluation.codecs.base import decoding_chunks
from turboquant_local.evaluation.codecs.turboquant import TurboQuantCodec

_NAME = "turboquant_measured"


@dataclass(frozen=True)
class LayerFidelity:
    """What the codec does to one layer.

    Attributes:
        layer: Index of the layer.
        key_cosine: Mean cosine between a packed key and what is read back, over far tokens, or over near ones where no
            token is far; None where nothing is packed.
        value_cosine: The same for values.
        output_error: |attention over the compressed cache - exact attention| / |exact attention|, over the model's
            own queries behind the context; the layer's inputs are exact.
        bits_per_coordinate: Bits really held for a coordinate of the packed tokens, scales and means included.
        stored_bytes: Bytes the layer holds at the end of a window.
        uncompressed_bytes: What transformers' own layer would hold.
        bypassed: Why the layer is not compressed; None where it is.
    """

    layer: int
    key_cosine: float | None = None
    value_cosine: float | None = None
    output_error: float | None = None
    bits_per_coordinate: float | None = None
    stored_bytes: int | None = None
    uncompressed_bytes: int | None = None
    bypassed: str | None = None


@torch.inference_mode()
def measure_layers(
    model: Any, windows: torch.Tensor, codec: TurboQuantCodec, *, context: int, chunk: int
) -> list[LayerFidelity]:
    """Measure every layer on the keys, values and queries that the model makes of a text.

    The model runs uncompressed; beside every layer's exact attention its keys and values go through a compressed
    layer, chunk by chunk, and the same queries attend there.

    Args:
        model: A causal language model that uses transformers' attention interface.
        windows: `[windows, length]` token ids.
        codec: What to measure.
        context: Queries at the start of a window that are left out.
        chunk: Fewest tokens that are added at a time; see `decoding_chunks`.

    Returns:
        One result a layer; a layer whose attention was not seen has no figures.
    """
    measurements: dict[int, _Sums] = {}
    bypassed: dict[str, str] = {}
    layers = 0
    for window in windows:
        cache = TurboQuantCache(model.config, codec.kv_cache, set_attention=False)
        bypassed, layers = cache.bypassed, len(cache.layers)
        recorder = _Recorder(cache, codec, context, chunk, measurements)
        with attention(model, _NAME), recorder.active():
            model(window[None].to(model.device), use_cache=False, logits_to_keep=1)
    return [
        measurements[index].result(index)
        if index in measurements
        else LayerFidelity(index, bypassed=bypassed.get(str(index)))
        for index in range(layers)
    ]


@dataclass
class _Sums:
    """One layer, over windows."""

    cosines: list[torch.Tensor] = field(default_factory=lambda: [torch.zeros(()), torch.zeros(())])
    packed: list[int] = field(default_factory=lambda: [0, 0])
    squared_error: float = 0.0
    squared_output: float = 0.0
    packed_bytes: int = 0
    packed_coordinates: int = 0
    stored_bytes: int = 0
    uncompressed_bytes: int = 0

    def result(self, index: int) -> LayerFidelity:
        cosines = [
            float(total) / count if count else None for total, count in zip(self.cosines, self.packed, strict=True)
        ]
        return LayerFidelity(
            layer=index,
            key_cosine=cosines[0],
            value_cosine=cosines[1],
            output_error=(self.squared_error / self.squared_output) ** 0.5 if self.squared_output else None,
            bits_per_coordinate=8 * self.packed_bytes / self.packed_coordinates if self.packed_coordinates else None,
            stored_bytes=self.stored_bytes,
            uncompressed_bytes=self.uncompressed_bytes,
        )


@dataclass(frozen=True)
class _Recorder:
    """Stands beside the model's attention during one forward pass."""

    cache: Any
    codec: TurboQuantCodec
    context: int
    chunk: int
    measurements: dict[int, _Sums]

    @contextmanager
    def active(self) -> Iterator[None]:
        token = _recorder.set(self)
        try:
            yield
        finally:
            _recorder.reset(token)

    def see(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, exact: torch.Tensor, kwargs: Any
    ) -> None:
        index: int = getattr(module, "layer_idx", len(self.cache.layers))
        layer = self.cache.layers[index] if index < len(self.cache.layers) else None
        # A layer that shares its keys with an earlier one attends to them a second time.
        if not isinstance(layer, CompressedLayer) or layer.get_seq_length():
            return
        sums = self.measurements.setdefault(index, _Sums())
        mask = kwargs.pop("attention_mask")
        length = query.shape[2]
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
        for start, stop in decoding_chunks(self.codec, length, self.chunk):
            keys, values = self.cache.update(key[:, :, start:stop], value[:, :, start:stop], index)
            if stop <= self.context:
                continue
            part = slice(max(start, self.context), stop)
            out, _ = turboquant_attention(module, query[:, :, part], keys, values, mask[:, :, part, :stop], **kwargs)
            sums.squared_error += float((out.float() - exact[:, part].float()).square().sum())
            sums.squared_output += float(exact[:, part].float().square().sum())
        self._compare(sums, layer, (key, value))

    def _compare(self, sums: _Sums, layer: CompressedLayer, originals: tuple[torch.Tensor, torch.Tensor]) -> None:
        coordinates = 0
        for side, (stored, original) in enumerate(zip((layer.keys, layer.values), originals, strict=True)):
            if not isinstance(stored, KVHandle):
                continue
            config, length = self.codec.kv_cache, original.shape[2]
            packed = config.packed_length(length)
            counted = slice(config.sink_length, config.sink_length + (config.far_length(length) or packed))
            read = stored.dequantize()[:, :, counted]
            cosine = torch.cosine_similarity(read.float(), original[:, :, counted].float(), dim=-1)
            sums.cosines[side] = sums.cosines[side] + cosine.double().sum().cpu()
            sums.packed[side] += cosine.numel()
            coordinates += original[:, :, :packed].numel()
        memory = report([layer])
        plain = memory.sinks + memory.recent + memory.bypassed + memory.constants
        sums.packed_bytes, sums.packed_coordinates = memory.total - plain, coordinates
        sums.stored_bytes, sums.uncompressed_bytes = memory.total - memory.constants, memory.uncompressed
        layer.reset()


_recorder: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


def _measured_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Exact attention, seen by the recorder of this measurement."""
    out = turboquant_attention(module, query, key, value, attention_mask, **kwargs)
    recorder = _recorder.get()
    if recorder is not None:
        recorder.see(module, query, key, value, out[0], {**kwargs, "attention_mask": attention_mask})
    return out


AttentionInterface.register(_NAME, _measured_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
