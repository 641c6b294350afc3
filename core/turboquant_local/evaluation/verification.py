"""Is a model safe with these settings? Measure, and hold the figures against thresholds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from turboquant_local.cache.auto import choose
from turboquant_local.cache.layer import CompressedLayer
from turboquant_local.codec import lloyd_max
from turboquant_local.config import TurboQuantConfig
from turboquant_local.errors import ConfigError, EvaluationError
from turboquant_local.evaluation.codecs.turboquant import TurboQuantCodec
from turboquant_local.evaluation.comparison import TOKENS
from turboquant_local.evaluation.fidelity import CHUNK, UNCOMPRESSED, Fidelity, measure_fidelity
from turboquant_local.evaluation.layers import LayerFidelity, measure_layers
from turboquant_local.evaluation.windows import CONTEXT

COSINE_MARGIN: Final = 0.01
"""How far a cosine may lie below what codes of so many bits give after a random rotation. Error feedback takes up to
.007 of it, measured on the embedded model at 2 bits: it errs where queries do not look."""


@dataclass(frozen=True)
class Thresholds:
    """What a model must reach.

    Attributes:
        cosine: Least mean cosine of keys and of values, in every layer. None: what Lloyd-Max codes of so many bits
            give any vector after a random rotation, less `COSINE_MARGIN`.
        kl: Greatest mean KL divergence to the uncompressed model, in nats.
        top1: Least share of tokens on which both put the same token first.
    """

    cosine: float | None = None
    kl: float = 0.01
    top1: float = 0.95


@dataclass(frozen=True)
class Check:
    """One figure against its threshold.

    Attributes:
        figure: "key_cosine", "value_cosine", "kl_mean" or "top1_agreement".
        value: What was measured.
        threshold: What it must reach.
        passed: Whether it does.
        layer: The layer it belongs to: the worst for a cosine, the one with the greatest output error for the whole
            model's figures; None where nothing was compressed.
    """

    figure: str
    value: float
    threshold: float
    passed: bool
    layer: int | None


@dataclass(frozen=True)
class Verification:
    """Everything that `verify` found.

    Attributes:
        kv_cache: The settings.
        fidelity: The whole model with the compressed cache.
        floor: The same with the identity codec: what rounding alone does.
        layers: Layer by layer.
        tokens: Length at which bytes are told: `comparison.TOKENS`, or the model's context if it is shorter.
        stored_bytes: Bytes of the cache at that length; None where they do not follow from the config.
        uncompressed_bytes: Bytes of transformers' own cache.
        checks: Figures against thresholds.
    """

    kv_cache: TurboQuantConfig
    fidelity: Fidelity
    floor: Fidelity
    layers: list[LayerFidelity]
    tokens: int
    stored_bytes: int | None
    uncompressed_bytes: int | None
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"passed": self.passed, **dataclasses.asdict(self)}


def verify(
    model: Any,
    windows: torch.Tensor,
    kv_cache: TurboQuantConfig,
    thresholds: Thresholds | None = None,
    *,
    context: int = CONTEXT,
    chunk: int = CHUNK,
    on_progress: Callable[[str], None] | None = None,
) -> Verification:
    """Measure a model with a compressed cache on a text, and check it.

    Layers are measured on the first window, predictions on all.

    Args:
        model: A causal language model.
        windows: `[windows, length]` token ids; see `cut_windows`.
        kv_cache: The settings; with "auto", those that suit the model are taken.
        thresholds: What must be reached; the defaults if None.
        context: Tokens at the start of a window that are not scored.
        chunk: Fewest tokens fed at a time; see `decoding_chunks`.
        on_progress: Called `2 * windows + 1` times.

    Raises:
        ConfigError: The settings do not fit the model.
        EvaluationError: The windows leave nothing to score, or end before anything is packed.
    """
    thresholds = thresholds or Thresholds()
    kv_cache = choose(kv_cache, model.config).kv_cache
    codec = TurboQuantCodec(kv_cache.preset, kv_cache)
    length = windows.shape[1]
    compresses = any(isinstance(layer, CompressedLayer) for layer in codec.cache(model.config).layers)
    if compresses and codec.seen(length - 1)[0] == 0:
        raise EvaluationError(
            f"windows of {length} tokens: they end before a token is packed, so that every figure would be perfect; "
            "take longer ones"
        )
    identity = dataclasses.replace(kv_cache, k_bits=16, v_bits=16, layer_bits=())
    floor_codec = TurboQuantCodec("identity", identity)
    fidelity, floor = measure_fidelity(
        model, windows, [codec, floor_codec], context=context, chunk=chunk, on_progress=on_progress
    )
    layers = measure_layers(model, windows[:1], codec, context=context, chunk=chunk)
    if on_progress is not None:
        on_progress("layers")
    tokens = min(TOKENS, getattr(model.config.get_text_config(), "max_position_embeddings", TOKENS))
    stored, uncompressed = (_bytes(which, model.config, tokens) for which in (codec, UNCOMPRESSED))
    checks = _check(model.config, kv_cache, thresholds, fidelity, layers)
    return Verification(kv_cache, fidelity, floor, layers, tokens, stored, uncompressed, checks)


def _check(
    model_config: Any,
    kv_cache: TurboQuantConfig,
    thresholds: Thresholds,
    fidelity: Fidelity,
    layers: list[LayerFidelity],
) -> list[Check]:
    checks = []
    for figure, side in (("key_cosine", "k_bits"), ("value_cosine", "v_bits")):
        found = {layer.layer: getattr(layer, figure) for layer in layers if getattr(layer, figure) is not None}
        least = {
            layer: expected_cosine(model_config, getattr(kv_cache.of_layer(layer), side))
            if thresholds.cosine is None
            else thresholds.cosine
            for layer in found
        }
        if found:
            worst = min(found, key=lambda layer: found[layer] - least[layer])
            checks.append(Check(figure, found[worst], least[worst], found[worst] >= least[worst], worst))
    errors = {layer.layer: layer.output_error for layer in layers if layer.output_error is not None}
    loudest = max(errors, key=errors.__getitem__) if errors else None
    kl, top1 = fidelity.kl_mean, fidelity.top1_agreement
    checks.append(Check("kl_mean", kl, thresholds.kl, kl <= thresholds.kl, loudest))
    checks.append(Check("top1_agreement", top1, thresholds.top1, top1 >= thresholds.top1, loudest))
    return checks


def expected_cosine(model_config: Any, bits: int) -> float:
    """Cosine between a vector and its Lloyd-Max codes after a random rotation, less `COSINE_MARGIN`.

    The codebook's squared error e for a unit vector (paper, Theorem 1) makes it sqrt(1 - e).

    Args:
        model_config: The model's config; where it does not say one head size, 128 is taken.
        bits: Bits a coordinate.
    """
    shape = UNCOMPRESSED.cache(model_config).kv_shape
    error = lloyd_max(shape[1] if shape else 128, bits).mse if bits < 16 else 0.0
    return float((1 - error) ** 0.5 - COSINE_MARGIN)


def _bytes(codec: TurboQuantCodec, model_config: Any, tokens: int) -> int | None:
    try:
        return codec.stored_bytes(model_config, tokens)
    except ConfigError:  # recurrent layers, or heads that the config does not tell
        return None
