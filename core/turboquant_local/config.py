"""How a KV cache is compressed: `TurboQuantConfig` and the named presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from turboquant_local.errors import ConfigError, did_you_mean
from turboquant_local.widths import BITS, LayerBits, by_layer, layer_bits

Rotation = Literal["auto", "hadamard", "dense"]
Scale = Literal["unbiased", "least_error", "norm"]
CodebookName = Literal["grid", "lloyd_max"]

BLOCK_LENGTH: Final = 32
"""Tokens that leave the recent window together and are packed as one block."""

STATISTICS_LENGTH: Final = 128
"""Tokens behind the sinks that give a head's mean key and channel weights, at most."""

ALL_LAYERS: Final = 1_000_000
"""As `skip_first_layers`: no layer is compressed."""

_DEFAULTS: Final[dict[str, object]] = {
    "k_bits": 4,
    "v_bits": 4,
    "sink_length": 4,
    "residual_length": 32,
    "near_length": 256,
    "near_bits": 6,
    "rotation": "auto",
    "codebook": "grid",
    "scale": "unbiased",
    "scale_bits": 8,
    "center_keys": True,
    "error_feedback": True,
    "skip_first_layers": 0,
    "skip_last_layers": 0,
    "layer_bits": (),
    "seed": 0,
}

# What each costs, measured by `make quality` on the embedded model (README, "How good is it"): bytes at 4,096 tokens,
# mean KL divergence in nats, perplexity, retrieval against the uncompressed cache.
#   balanced  3.70x  .00040  +0.04 %  100.2 %     turboquant_k8v4     2.55x  .00010  +0.01 %
#   compact   4.72x  .00117  +0.17 %  100.2 %     turboquant_k3v4_nc  4.15x  .00094  +0.14 %
#   extreme   6.03x  .00267  +0.36 %   99.7 %     paper               3.85x  .00423  +0.55 %
PRESETS: Final[Mapping[str, Mapping[str, object]]] = {
    # Ours: sinks, recent window, near codes, a uniform grid, unbiased scale, centering and error feedback.
    "balanced": {},
    "compact": {"k_bits": 3, "v_bits": 3},
    "extreme": {"k_bits": 2, "v_bits": 2, "near_length": 448},
    # Algorithm 1 of the paper alone, with nothing added.
    "paper": {
        "sink_length": 0,
        "residual_length": 0,
        "near_length": 0,
        "codebook": "lloyd_max",
        "scale": "norm",
        "scale_bits": 16,
        "center_keys": False,
        "error_feedback": False,
    },
    # vLLM's names for the same bits, with all that is ours around them.
    "turboquant_k8v4": {"k_bits": 8, "v_bits": 4},
    "turboquant_4bit_nc": {"k_bits": 4, "v_bits": 4},
    "turboquant_k3v4_nc": {"k_bits": 3, "v_bits": 4},
    "turboquant_3bit_nc": {"k_bits": 3, "v_bits": 3},
    # The same blocks with nothing lost: for tests of equality.
    "identity": {"k_bits": 16, "v_bits": 16},
    # transformers' own layers and attention: the baseline of every comparison.
    "uncompressed": {"k_bits": 16, "v_bits": 16, "skip_first_layers": ALL_LAYERS},
}

AUTO: Final = "auto"
"""A preset still to be chosen for the model at hand, see `cache.auto`. Its fields stay None until then."""

_FROM_PRESET: Final[Any] = None
"""Default of a field: `__post_init__` puts the preset's value in its place."""


@dataclass(frozen=True, kw_only=True)
class TurboQuantConfig:
    """How keys and values are stored. A field left at None takes the preset's value.

    Attributes:
        preset: A name in `PRESETS`; the other fields override it one by one. Or "auto": the cache chooses a preset
            once it knows the model, and until then a field is None unless it was given. On the embedded model and
            WikiText-2, "balanced" changes perplexity by +0.04 %, "compact" by +0.17 %, "extreme" by +0.36 %, "paper"
            by +0.55 % (README, "How good is it": command, machine, and other measures).
        k_bits: Bits per key coordinate, one of 1, 2, 3, 4, 6, 8, 16 (16: the model's dtype, nothing lost).
        v_bits: The same for values.
        sink_length: First tokens that stay in the model's dtype (attention sinks).
        residual_length: Most recent tokens that stay in the model's dtype, at most. Tokens leave the window in
            blocks of `block_length`.
        near_length: Tokens just before those, at most, that are packed at `near_bits`: attention falls mostly on
            what is near, so it pays to code it finer. A multiple of `block_length`; 0 for none.
        near_bits: Bits of both keys and values there, one of 1, 2, 3, 4, 6, 8. A side that has more bits keeps them.
        rotation: "hadamard" (randomized; needs a head size of 2^k or 3*2^k), "dense" (a random orthogonal
            matrix, any head size), or "auto": hadamard where it exists, else dense.
        codebook: "grid": levels at equal distances, with a step for every vector (see `codec.grid`); "lloyd_max": the
            paper's levels, which the kernels read more slowly.
        scale: What is stored beside the codes, per token and head: "unbiased", |x|^2 / <x, x̂>: inner products
            without bias; "least_error", <x, x̂> / |x̂|^2: the least squared error; "norm", |x|, as in the paper.
        scale_bits: 16 (float16), or 8: its logarithm in steps of 2.2 %, for codes of up to 4 bits.
        center_keys: Subtract a mean key per head before quantising. Softmax does not see a constant shift, so
            this costs nothing and rescues models with a bias on keys (Qwen2, Qwen2.5).
        error_feedback: Choose the codes of keys one coordinate after the other, each making up for the errors
            before it where queries would feel them (see `codec.feedback`). Costs time when tokens are packed, no
            bytes, and nothing when they are read.
        skip_first_layers: Attention layers at the start that are left uncompressed.
        skip_last_layers: The same at the end.
        layer_bits: `{layer: (k_bits, v_bits)}`, layers counted from 0: what single layers have instead of `k_bits`
            and `v_bits`. Few layers make most of the loss; `turboquant-local tune` finds them for a model. Kept as
            `((layer, k_bits, v_bits), ...)`.
        seed: Seed of the rotation.

    Raises:
        ConfigError: An unknown preset, or a value outside its range.
    """

    preset: str = "balanced"
    k_bits: int = _FROM_PRESET
    v_bits: int = _FROM_PRESET
    sink_length: int = _FROM_PRESET
    residual_length: int = _FROM_PRESET
    near_length: int = _FROM_PRESET
    near_bits: int = _FROM_PRESET
    rotation: Rotation = _FROM_PRESET
    codebook: CodebookName = _FROM_PRESET
    scale: Scale = _FROM_PRESET
    scale_bits: int = _FROM_PRESET
    center_keys: bool = _FROM_PRESET
    error_feedback: bool = _FROM_PRESET
    skip_first_layers: int = _FROM_PRESET
    skip_last_layers: int = _FROM_PRESET
    layer_bits: LayerBits = _FROM_PRESET
    seed: int = _FROM_PRESET

    def __post_init__(self) -> None:
        names = [*PRESETS, AUTO]
        if not isinstance(self.preset, str) or self.preset not in names:
            raise ConfigError(
                f"preset={self.preset!r}: expected one of {', '.join(names)}{did_you_mean(self.preset, names)}"
            )
        if self.preset == AUTO:
            # What was given is checked beside the defaults, which stand for what is not known yet.
            checked = dataclasses.replace(self, preset="balanced")
            if self.layer_bits is not None:
                object.__setattr__(self, "layer_bits", checked.layer_bits)
            return
        for name, value in (_DEFAULTS | dict(PRESETS[self.preset])).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, choices in (
            ("k_bits", BITS),
            ("v_bits", BITS),
            ("near_bits", BITS[:-1]),
            ("rotation", get_args(Rotation)),
            ("codebook", get_args(CodebookName)),
            ("scale", get_args(Scale)),
            ("scale_bits", (8, 16)),
        ):
            value = getattr(self, name)
            if isinstance(value, bool | float) or value not in choices:
                raise ConfigError(f"{name}={value!r}: expected one of {', '.join(map(str, choices))}")
        for name in ("sink_length", "residual_length", "near_length", "skip_first_layers", "skip_last_layers", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}={value!r}: expected an integer of 0 or more")
        object.__setattr__(self, "layer_bits", layer_bits(self.layer_bits))
        if self.layer_bits and self.k_bits == self.v_bits == 16:
            raise ConfigError(
                f"layer_bits={dict(by_layer(self.layer_bits))}: with k_bits=16 and v_bits=16 nothing is packed in the "
                "other layers; give one of these fewer bits"
            )
        for name in ("center_keys", "error_feedback"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected True or False")
        if self.near_length % self.block_length:
            raise ConfigError(
                f"near_length={self.near_length}: expected a multiple of {self.block_length}, the tokens that are "
                "packed together; use 0 for none"
            )

    @classmethod
    def parse(cls, value: TurboQuantConfig | Mapping[str, Any] | str | None = None, **fields: Any) -> TurboQuantConfig:
        """Build a config from what a user may write: a config, a dict of fields, a preset's name, or nothing.

        Args:
            value: The settings; None means the preset "balanced".
            fields: Fields that override those of `value`.

        Raises:
            ConfigError: An unknown field or preset, or a value outside its range.
        """
        if isinstance(value, cls):
            return dataclasses.replace(value, **_known(fields)) if fields else value
        if isinstance(value, str):
            value = {"preset": value}
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(
                f"kv_cache={value!r}: expected a preset's name, a dict of fields or a TurboQuantConfig, "
                f"not {type(value).__name__}"
            )
        return cls(**_known({**(value or {}), **fields}))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, without those that "auto" leaves open; `parse` reads them back."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        widths = dict(by_layer(fields.pop("layer_bits", ())))
        return {**fields, "layer_bits": widths} if widths else fields

    def of_layer(self, layer: int) -> TurboQuantConfig:
        """The settings of one layer."""
        for index, k_bits, v_bits in self.layer_bits:
            if index == layer:
                return dataclasses.replace(self, k_bits=k_bits, v_bits=v_bits, layer_bits=())
        return dataclasses.replace(self, layer_bits=()) if self.layer_bits else self

    @property
    def block_length(self) -> int:
        """Tokens that are packed together: a power of two, no more than the recent window has."""
        return 1 << (min(BLOCK_LENGTH, max(self.residual_length, 1)).bit_length() - 1)

    @property
    def sample_length(self) -> int:
        """Tokens behind the sinks that give the statistics of a head; nothing is packed before they are there."""
        if self.k_bits == self.v_bits == 16:
            return self.block_length
        return max(self.block_length, min(STATISTICS_LENGTH, self.residual_length + self.near_length))

    def packed_length(self, length: int) -> int:
        """Tokens in packed storage once a sequence has `length` tokens (sinks and recent window are the rest)."""
        if length < self.sink_length + self.sample_length:
            return 0
        kept_back = self.sink_length + max(0, self.residual_length - self.block_length)
        return max(0, length - kept_back) // self.block_length * self.block_length

    def far_length(self, length: int) -> int:
        """How many of the packed tokens are at `k_bits` and `v_bits`; the rest are at `near_bits`."""
        return max(0, self.packed_length(length) - self.near_length)


def plain_settings(value: TurboQuantConfig | Mapping[str, Any] | str | None) -> dict[str, Any] | str | None:
    """What a user wrote as settings, in values that YAML and JSON can hold, and no more of it.

    Raises:
        ConfigError: As `TurboQuantConfig.parse`.
    """
    config = TurboQuantConfig.parse(value)
    if isinstance(value, TurboQuantConfig):
        return value.to_dict()
    if not isinstance(value, Mapping):
        return value
    if not value.get("layer_bits"):
        return dict(value)
    return {**value, "layer_bits": dict(by_layer(config.layer_bits))}


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(TurboQuantConfig)]
    for name in fields:
        if name not in names:
            raise ConfigError(
                f"{name}: no such field of the KV cache{did_you_mean(name, names)}; known: {', '.join(names)}"
            )
    return dict(fields)
