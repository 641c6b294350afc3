"""Room for the keys or the values of layers with one codec: where their tokens lie, and how they move on.

What is quantised for several layers at once gives the codes of each alone, but for a code on a boundary: products of
other numbers of rows may round otherwise.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from turboquant_local.cache.storage import SideCodec
from turboquant_local.codec.quantizer import Quantizer
from turboquant_local.codec.statistics import HeadStatistics
from turboquant_local.kernels import api
from turboquant_local.kernels.layout import KVView, PackedKV


class SideBuffers:
    """The keys or the values of some layers, stacked in the batch dimension but for the far ones, which are large."""

    def __init__(self, like: KVView, codec: SideCodec, layers: int, capacities: tuple[int, int, int, int]) -> None:
        """Make room.

        Args:
            like: Gives batch, heads, head_dim, dtype and device.
            codec: The codec of this side.
            layers: How many layers.
            capacities: Room for sinks, far, near and recent tokens.
        """
        batch, heads, _, head_dim = like.shape
        x = like.recent
        self._codec = codec
        sinks, far, near, recent = capacities
        stacked = layers * batch
        self._batch = batch
        self._sinks = x.new_empty(stacked, heads, sinks, head_dim)
        self._recent = x.new_empty(stacked, heads, recent, head_dim)
        # What they are for each head is not known before something is packed; until then nothing depends on it.
        blank = codec.statistics(x.new_ones(1, 1, 1, head_dim))
        self._statistics = blank.map(lambda x: x.repeat(stacked, heads, *(1,) * (x.dim() - 2)))
        self._near = _room(codec.near, self._recent, near, self._statistics)
        self._far_capacity = far
        self._far: list[PackedKV] = []

    def load(self, index: int, view: KVView | None) -> None:
        """Copy a layer's tokens; those that are here already, as a view of these buffers, stay.

        Room for far tokens is taken when a layer is loaded first, in the order of layers: its old tokens can be freed
        before the next layer takes more.
        """
        assert view is not None
        if index == len(self._far):
            self._far.append(_room(self._codec.far, view.recent, self._far_capacity, self._of(index)))
        to = self.view(index, None)
        _copy(to.sinks, view.sinks)
        _copy(to.recent, view.recent)
        for room, part in ((to.far, view.far), (to.near, view.near)):
            if room is not None and part is not None:
                _copy(room.codes, part.codes)
                if room.scales is not None and part.scales is not None:
                    _copy(room.scales, part.scales)
        if view.packed and to.statistics is not None and view.statistics is not None:
            for field, known in zip(to.statistics.fields, view.statistics.fields, strict=True):
                if field is not None and known is not None:
                    _copy(field, known)

    def view(self, index: int, lengths: torch.Tensor | None) -> KVView:
        """A layer's buffers as a whole."""
        rows = slice(index * self._batch, (index + 1) * self._batch)
        return KVView(
            self._sinks[rows],
            self._far[index],
            _rows(self._near, rows, self._of(index)),
            self._recent[rows],
            self._of(index),
            lengths,
        )

    def used(self, index: int, in_use: tuple[int, int, int, int]) -> KVView:
        """A layer's tokens, as the snapshot form holds them."""
        return self.view(index, None).first(*in_use)

    def pack(self, count: int, near: int, recent: int) -> None:
        """Pack the oldest of the recent tokens behind so many near ones."""
        unweighted = replace(self._statistics, weights=None)
        packed = api.quantize_kv(self._recent[:, :, :count], self._codec.near, unweighted, counted=self._codec.packing)
        _write(self._near, packed, near)
        _shift(self._recent, count, recent)

    def demote(self, count: int, far: int, near: int) -> None:
        """Pack the oldest of the near tokens again, behind so many far ones."""
        leaving = self._near.tokens(0, count)
        packed = api.requantize_kv(leaving, self._codec.far, self._statistics, counted=self._codec.packing)
        for index, room in enumerate(self._far):
            rows = slice(index * self._batch, (index + 1) * self._batch)
            _write(room, _rows(packed, rows, self._of(index)), far)
        _shift(self._near.codes, count, near)
        if self._near.scales is not None:
            _shift(self._near.scales, count, near)

    def _of(self, index: int) -> HeadStatistics:
        rows = slice(index * self._batch, (index + 1) * self._batch)
        return self._statistics.map(lambda x: x[rows])


def _room(quantizer: Quantizer, like: torch.Tensor, tokens: int, statistics: HeadStatistics) -> PackedKV:
    """Room for packed tokens of as many sequences and heads as `like` has."""
    unit = torch.ones(1, 1, 1, device=like.device)
    one = api.quantize_kv(like.new_ones(1, 1, 1, like.shape[3]), quantizer, HeadStatistics(scale_unit=unit))
    size = (*like.shape[:2], tokens)
    codes = one.codes.new_empty(*size, one.codes.shape[3])
    scales = None if one.scales is None else one.scales.new_empty(size)
    return PackedKV(
        quantizer, codes, scales, None if one.scale_unit is None else statistics.scale_unit, statistics.mean
    )


def _rows(packed: PackedKV, rows: slice, statistics: HeadStatistics) -> PackedKV:
    scales = None if packed.scales is None else packed.scales[rows]
    unit = None if packed.scale_unit is None else statistics.scale_unit
    return PackedKV(packed.quantizer, packed.codes[rows], scales, unit, statistics.mean)


def _write(room: PackedKV, packed: PackedKV, start: int) -> None:
    room.codes[:, :, start : start + packed.length] = packed.codes
    if room.scales is not None and packed.scales is not None:
        room.scales[:, :, start : start + packed.length] = packed.scales


def _copy(room: torch.Tensor, x: torch.Tensor) -> None:
    if x.numel() and x.data_ptr() != room.data_ptr():
        room[:, :, : x.shape[2]] = x


def _shift(x: torch.Tensor, count: int, length: int) -> None:
    """Let the tokens behind the first `count` move up."""
    if length > count:
        x[:, :, : length - count] = x[:, :, count:length].clone()
