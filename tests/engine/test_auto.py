"""`preset="auto"` through an engine, which learns of the model only when it loads it."""

from collections.abc import Callable

from turboquant_local.config import TurboQuantConfig
from turboquant_local.engine import ChatEngine, GenerationOptions, Message


def test_the_first_generation_fills_it_in(make_engine: Callable[..., ChatEngine]) -> None:
    engine = make_engine(kv_cache={"preset": "auto", "v_bits": 8}, options=GenerationOptions(max_new_tokens=2))
    assert engine.kv_cache.to_dict() == {"preset": "auto", "v_bits": 8}
    assert engine.kv_cache_explanation == ""
    chosen = TurboQuantConfig(preset="balanced", v_bits=8)
    for _ in range(2):
        reply = engine.chat([Message("user", "Hello")])
        assert reply.metrics.kv_cache == chosen.to_dict()
        assert engine.kv_cache == chosen
        assert engine.kv_cache_explanation.startswith("qwen3: preset 'balanced' is chosen.")
        engine.reset()
