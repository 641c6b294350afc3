"""With the identity codec, text is the same as with transformers' own cache, in every way of using a cache."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
)

from turboquant_local.cache import TurboQuantCache
from turboquant_local.testing import TINY_MODELS, random_tokens, tiny_model

pytestmark = pytest.mark.usefixtures("_one_thread")

MakeCache = Callable[[], Cache]
Texts = list[list[int]]
Scenario = Callable[[PreTrainedModel, MakeCache], Texts]

OLD = Version(transformers.__version__) < Version("5.20")

# Many blocks are packed within a hundred tokens: 2 sinks, blocks of 8, at most 8 tokens in the window.
SMALL = {"preset": "identity", "sink_length": 2, "residual_length": 8, "near_length": 16}
FORGETFUL = {"k_bits": 1, "v_bits": 1, "sink_length": 0, "residual_length": 1, "near_length": 0}
PROMPT, NEW = 72, 20

# Architectures whose softcap or sinks transformers' sdpa leaves out: stock runs them in eager mode.
EAGER_TYPES = ("gemma2", "gpt_oss")


@functools.cache
def model_with(owner: str, name: str) -> PreTrainedModel:
    """One model object per owner of its config: ours switches the attention, stock must not see that."""
    model = tiny_model(name)
    if model.config.model_type in EAGER_TYPES:
        model.set_attn_implementation("eager")
    return model


def generate(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache, mask: torch.Tensor | None = None, **options: object
) -> torch.Tensor:
    """Generated ids with the prompt, [batch, tokens]; greedy unless said otherwise."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


def padded(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts, the second 29 tokens shorter, padded on the left."""
    ids = random_tokens(2, PROMPT, seed=seed)
    mask = torch.ones_like(ids)
    mask[1, :29] = 0
    return ids * mask, mask


def greedy(model: PreTrainedModel, make_cache: MakeCache) -> Texts:
    return generate(model, random_tokens(1, PROMPT), make_cache()).tolist()


def sampling(model: PreTrainedModel, make_cache: MakeCache) -> Texts:
    texts = []
    for seed in range(3):
        torch.manual_seed(seed)
        texts += generate(model, random_tokens(1, PROMPT), make_cache(), do_sample=True, top_k=20).tolist()
    return texts


def left_padding(model: PreTrainedModel, make_cache: MakeCache) -> Texts:
    ids, mask = padded()
    return generate(model, ids, make_cache(), mask).tolist()


def beams(model: PreTrainedModel, make_cache: MakeCache) -> Texts:
    return generate(model, random_tokens(2, PROMPT), make_cache(), num_beams=3, num_return_sequences=2).tolist()


def prompt_lookup(model: PreTrainedModel, make_cache: MakeCache) -> Texts:
    ids = random_tokens(1, 12).repeat(1, 6)
    return generate(model, ids, make_cache(), prompt_lookup_num_tokens=3).tolist()


def assisted(model: PreTrainedModel, make_cache: MakeCache) -> Texts:
    # The same weights with 5 % of noise: some drafts are accepted, some are not.
    assistant = copy.deepcopy(model)
    assistant.set_attn_implementation("eager" if model.config.model_type in EAGER_TYPES else "sdpa")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return generate(model, random_tokens(1, PROMPT), make_cache(), assistant_model=assistant).tolist()


def multi_turn(model: PreTrainedModel, make_cache: MakeCache) -> Texts:
    cache, ids = make_cache(), random_tokens(1, PROMPT)
    for turn in range(3):
        ids = generate(model, torch.cat([ids, random_tokens(1, 11, seed=turn + 1)], dim=1), cache)
    return ids.tolist()


def multi_turn_padded(model: PreTrainedModel, make_cache: MakeCache) -> Texts:
    cache, (ids, mask) = make_cache(), padded()
    for turn in range(3):
        ids = torch.cat([ids, random_tokens(2, 11, seed=turn + 1)], dim=1)
        mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
        ids = generate(model, ids, cache, mask)
    return ids.tolist()


def chunked_prefill(model: PreTrainedModel, make_cache: MakeCache) -> Texts:
    return generate(model, random_tokens(1, PROMPT), make_cache(), prefill_chunk_size=20).tolist()


def chunked_padded(model: PreTrainedModel, make_cache: MakeCache) -> Texts:
    ids, mask = padded()
    return generate(model, ids, make_cache(), mask, prefill_chunk_size=20).tolist()


def chunked_second_turn(model: PreTrainedModel, make_cache: MakeCache) -> Texts:
    cache = make_cache()
    first = generate(model, random_tokens(1, PROMPT), cache)
    ids = torch.cat([first, random_tokens(1, 43, seed=1)], dim=1)
    return generate(model, ids, cache, prefill_chunk_size=20).tolist()


def prefix_fork(model: PreTrainedModel, make_cache: MakeCache) -> Texts:
    prefix, cache = random_tokens(1, PROMPT), make_cache()
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    return [
        generate(model, torch.cat([prefix, random_tokens(1, 9, seed=seed)], dim=1), copy.deepcopy(cache))[0].tolist()
        for seed in (1, 2)
    ]


def reset(model: PreTrainedModel, make_cache: MakeCache) -> Texts:
    cache = make_cache()
    first = generate(model, random_tokens(1, PROMPT, seed=1), cache)
    cache.reset()
    return first.tolist() + generate(model, random_tokens(1, PROMPT), cache).tolist()


SCENARIOS = (
    greedy,
    sampling,
    left_padding,
    beams,
    prompt_lookup,
    assisted,
    multi_turn,
    multi_turn_padded,
    chunked_prefill,
    chunked_padded,
    chunked_second_turn,
    prefix_fork,
    reset,
)


# Scenarios whose stock outcome is an error: ours must be the same error.
STATEFUL = "assisted generation is refused for models with a recurrent state"
STOCK_REFUSES = {(name, how): STATEFUL for name in ("qwen3.5", "falcon-h1") for how in (prompt_lookup, assisted)}
if OLD:
    OLD_ASSISTANT = "before 5.23 an assistant with sliding layers builds masks for tokens its cache dropped"
    STOCK_REFUSES |= {(name, assisted): OLD_ASSISTANT for name in ("mistral", "gemma2", "gemma3", "gpt-oss")}


def outcome(scenario: Scenario, model: PreTrainedModel, make_cache: MakeCache) -> Texts | str:
    """The texts, or the name of the error."""
    try:
        return scenario(model, make_cache)
    except Exception as error:
        return type(error).__name__


def outcome_of_stock(scenario: Scenario, name: str) -> Texts | str:
    model = model_with("stock", name)
    return outcome(scenario, model, lambda: DynamicCache(config=model.config))


@functools.cache
def reset_done_right(name: str) -> Texts:
    """Both texts of the reset scenario, each from a cache of its own."""
    model = model_with("stock", name)
    return [
        generate(model, random_tokens(1, PROMPT, seed=seed), DynamicCache(config=model.config))[0].tolist()
        for seed in (1, 0)
    ]


def second_turn_done_right(name: str) -> Texts:
    """Both turns read at once, by a cache of its own."""
    model = model_with("stock", name)
    first = generate(model, random_tokens(1, PROMPT), DynamicCache(config=model.config))
    ids = torch.cat([first, random_tokens(1, 43, seed=1)], dim=1)
    return generate(model, ids, DynamicCache(config=model.config)).tolist()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_identity_codec_gives_the_texts_of_the_stock_cache(name: str, scenario: Scenario) -> None:
    model, caches = model_with("ours", name), []

    def make_cache() -> TurboQuantCache:
        caches.append(TurboQuantCache(model.config, SMALL))
        return caches[-1]

    # Before 5.23 a reset stock cache keeps its length, so fresh caches are the reference.
    expected = reset_done_right(name) if scenario is reset else outcome_of_stock(scenario, name)
    assert isinstance(expected, str) == ((name, scenario) in STOCK_REFUSES)
    assert outcome(scenario, model, make_cache) == expected
    if not isinstance(expected, str):
        assert [cache.stats.materialized for cache in caches] == [0] * len(caches)
        assert all(
            cache.kv_cache.packed_length(cache.get_seq_length()) >= 56 for cache in caches if cache.get_seq_length()
        )


@pytest.mark.parametrize("name", TINY_MODELS)
def test_identity_codec_at_default_lengths(name: str) -> None:
    def long_text(model: PreTrainedModel, cache: Cache) -> list[int]:
        return generate(model, random_tokens(1, 300), cache, max_new_tokens=40)[0].tolist()

    model, stock = model_with("ours", name), model_with("stock", name)
    cache = TurboQuantCache(model.config, "identity")
    assert long_text(model, cache) == long_text(stock, DynamicCache(config=stock.config))
    assert cache.kv_cache.packed_length(cache.get_seq_length()) >= 192


@pytest.mark.parametrize("name", [name for name in TINY_MODELS if name not in ("mistral", "deepseek-v3")])
def test_a_codec_that_forgets_gives_other_texts(name: str) -> None:
    """Else the tests above could not fail."""
    model = model_with("ours", name)
    assert greedy(model, lambda: TurboQuantCache(model.config, FORGETFUL)) != outcome_of_stock(greedy, name)


@pytest.mark.parametrize("name", ["mistral", "deepseek-v3"])
def test_layers_that_cannot_be_compressed_keep_the_text_at_one_bit(name: str) -> None:
    model = model_with("ours", name)
    cache = TurboQuantCache(model.config, FORGETFUL)
    assert greedy(model, lambda: cache) == outcome_of_stock(greedy, name)
    assert sorted(cache.bypassed) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("scenario", "done_right"),
    [
        # `DynamicCache.reset` zeroes tensors that keep their length: the second text sees them.
        pytest.param(reset, reset_done_right, id="reset"),
        # Chunks of a second turn start again at the first token.
        pytest.param(chunked_second_turn, second_turn_done_right, id="chunked_second_turn"),
    ],
)
def test_stock_is_wrong_only_before_5_23(scenario: Scenario, done_right: Callable[[str], Texts]) -> None:
    assert (outcome_of_stock(scenario, "llama") != done_right("llama")) == OLD


@functools.cache
def tiny_bart() -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=128,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=256,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=1,
        decoder_start_token_id=2,
        eos_token_id=None,
        forced_eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_decoder(beams: int) -> None:
    def text(model: BartForConditionalGeneration, make_cache: MakeCache, seed: int = 0) -> list[int]:
        cache = EncoderDecoderCache(make_cache(), make_cache())
        ids = random_tokens(1, 60, seed=seed)
        options = {"max_new_tokens": 40, "num_beams": beams, "do_sample": False, "eos_token_id": None}
        return model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)[0].tolist()

    stock, ours, caches = copy.deepcopy(tiny_bart()), copy.deepcopy(tiny_bart()), []

    def make_cache() -> TurboQuantCache:
        caches.append(TurboQuantCache(ours.config, SMALL))
        return caches[-1]

    expected = text(stock, lambda: DynamicCache(config=stock.config))
    assert expected != text(stock, lambda: DynamicCache(config=stock.config), seed=1)  # it reads the encoder
    assert text(ours, make_cache) == expected
    assert [cache.get_seq_length() for cache in caches] == [40, 60]
    ours.set_attn_implementation("turboquant")
    assert text(ours, make_cache) == expected
    assert [cache.stats.materialized for cache in caches[2:]] == [0, 0]
    assert text(ours, lambda: TurboQuantCache(ours.config, FORGETFUL)) != expected
