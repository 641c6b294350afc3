import dataclasses
import json

import pytest

from turboquant_local.config import PRESETS, TurboQuantConfig
from turboquant_local.errors import ConfigError


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_a_round_trip_through_plain_values(preset: str) -> None:
    config = TurboQuantConfig.parse(preset)
    assert TurboQuantConfig.parse(config.to_dict()) == config
    assert all(type(value) in (str, int, bool) for value in config.to_dict().values())


def test_fields_override_the_preset() -> None:
    config = TurboQuantConfig.parse({"preset": "compact", "v_bits": 2}, sink_length=0)
    assert (config.k_bits, config.v_bits, config.sink_length, config.residual_length) == (3, 2, 0, 32)
    assert TurboQuantConfig.parse(config, k_bits=8).k_bits == 8
    assert TurboQuantConfig.parse() == TurboQuantConfig(preset="balanced")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k_bits = 2  # type: ignore[misc]


def test_bits_of_single_layers_survive_json() -> None:
    config = TurboQuantConfig.parse({"preset": "compact", "layer_bits": {7: (6, 4), 2: [2, 2]}})
    assert TurboQuantConfig.parse(json.loads(json.dumps(config.to_dict()))) == config
    assert config.of_layer(7) == TurboQuantConfig(preset="compact", k_bits=6, v_bits=4)
    assert config.of_layer(0) == TurboQuantConfig(preset="compact")
    assert "layer_bits" not in TurboQuantConfig().to_dict()
    auto = TurboQuantConfig.parse({"preset": "auto", "layer_bits": {"7": [6, 4]}})
    assert auto.to_dict() == {"preset": "auto", "layer_bits": {"7": [6, 4]}}


def test_scale_is_unbiased_unless_the_paper_is_asked_for() -> None:
    assert TurboQuantConfig().scale == "unbiased"
    paper = TurboQuantConfig(preset="paper")
    assert (paper.scale, paper.center_keys, paper.sink_length, paper.residual_length) == ("norm", False, 0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "balnced"}, r"preset='balnced': expected one of balanced.*did you mean 'balanced'"),
        ({"preset": 4}, "preset=4"),
        ({"kbits": 4}, r"kbits: no such field.*did you mean 'k_bits'.*known: preset, k_bits"),
        ({"k_bits": 7}, "k_bits=7: expected one of 1, 2, 3, 4, 6, 8, 16"),
        ({"k_bits": 3.0}, "k_bits=3.0: expected one of"),
        ({"layer_bits": {1.5: (3, 2)}}, "layer_bits={1.5"),
        ({"v_bits": "4"}, "v_bits='4'"),
        ({"v_bits": True}, "v_bits=True"),
        ({"rotation": "haar"}, "rotation='haar': expected one of auto, hadamard, dense"),
        ({"scale": "l2"}, "scale='l2': expected one of unbiased, least_error, norm"),
        ({"sink_length": -1}, "sink_length=-1: expected an integer of 0 or more"),
        ({"residual_length": 1.5}, "residual_length=1.5"),
        ({"center_keys": 1}, "center_keys=1: expected True or False"),
        ({"error_feedback": None, "preset": "paper", "near_length": "x"}, "near_length='x'"),
        ({"near_length": 100}, "near_length=100: expected a multiple of 32"),
        ({"near_bits": 16}, "near_bits=16: expected one of 1, 2, 3, 4, 6, 8$"),
        ({"scale_bits": 4}, "scale_bits=4: expected one of 8, 16"),
        (7, "kv_cache=7: expected a preset's name, a dict of fields"),
        (
            {"layer_bits": {0: (5, 4)}},
            r"layer_bits=\{0: \(5, 4\)\}: expected layers, .* as in \{5: \(6, 4\)\}",
        ),
        ({"layer_bits": {0: 4}}, "layer_bits="),
        ({"layer_bits": {"first": (4, 4)}}, "layer_bits="),
        ({"layer_bits": {-1: (4, 4)}}, "layer_bits="),
        ({"layer_bits": {0: (16, 4)}}, "layer_bits="),
        ({"layer_bits": {0: (4, 4), "0": (3, 3)}}, "layer_bits="),
        ({"layer_bits": [4]}, "layer_bits="),
        ({"preset": "identity", "layer_bits": {0: (4, 4)}}, "layer_bits=.*give one of these fewer bits"),
    ],
)
def test_bad_settings_are_named(settings: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TurboQuantConfig.parse(settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("residual", "block", "longest", "shortest"), [(128, 32, 127, 96), (16, 16, 15, 0), (1, 1, 0, 0), (0, 1, 0, 0)]
)
def test_the_recent_window_stays_within_its_length(residual: int, block: int, longest: int, shortest: int) -> None:
    config = TurboQuantConfig(residual_length=residual, near_length=0)
    assert config.block_length == block
    windows = [n - config.sink_length - config.packed_length(n) for n in range(config.sink_length + 200, 1000)]
    assert (min(windows), max(windows)) == (shortest, longest)
    assert config.packed_length(config.sink_length + residual - 1) == 0
    assert all(config.packed_length(n + 1) >= config.packed_length(n) for n in range(1000))


def test_old_tokens_are_far_and_those_before_the_window_near() -> None:
    config = TurboQuantConfig(residual_length=32, near_length=64)
    lengths = range(config.sink_length + config.sample_length, 2000)
    assert all(config.packed_length(n) - config.far_length(n) == min(64, config.packed_length(n)) for n in lengths)
    assert config.far_length(config.sink_length + config.sample_length - 1) == 0
    assert config.packed_length(config.sink_length + config.sample_length - 1) == 0  # statistics come first
    assert TurboQuantConfig().sample_length == 128
