"""Gumbel-max samples the right distribution, repeats with its seed, and follows the model's own defaults."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from turboquant_local.engine.sampling import DEFAULT_MAX_NEW_TOKENS, GumbelNoise, Sampling, resolve_sampling
from turboquant_local.engine.types import GenerationOptions
from turboquant_local.errors import GenerationOptionError
from turboquant_local.testing import tiny_model

CPU = torch.device("cpu")


def resolve(options: GenerationOptions, *, room: int = 1000, **defaults: object) -> Sampling:
    return resolve_sampling(options, GenerationConfig(**defaults), room=room, eos_token_id=7, device=CPU)


def names(processors: LogitsProcessorList) -> list[str]:
    return [type(processor).__name__ for processor in processors]


def test_the_maximum_over_gumbel_noise_is_a_sample() -> None:
    probabilities = torch.tensor([0.6, 0.25, 0.1, 0.05, 0.0])
    rows = 200_000
    noisy = GumbelNoise(0, CPU)(torch.empty(rows, 0), probabilities.log().expand(rows, -1))
    found = torch.bincount(noisy.argmax(-1), minlength=5) / rows
    # Five standard deviations of a binomial share.
    assert ((found - probabilities).abs() <= 5 * (probabilities * (1 - probabilities) / rows).sqrt()).all()
    assert not noisy.isnan().any()


def test_seeds_repeat_and_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    scores = torch.zeros(1, 100)
    first, again, other, unseeded, unseeded_again = (
        GumbelNoise(seed, CPU)(torch.empty(1, 0), scores) for seed in (3, 3, 4, None, None)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(unseeded, unseeded_again)
    assert torch.equal(torch.get_rng_state(), before)


def test_greedy_needs_no_processors() -> None:
    assert names(resolve(GenerationOptions()).processors) == []
    for options in (GenerationOptions(temperature=0), GenerationOptions(do_sample=False)):
        sampling = resolve(options, do_sample=True, temperature=0.6, top_p=0.9)
        assert names(sampling.processors) == []
        assert sampling.config.do_sample is False


def test_a_temperature_alone_samples() -> None:
    sampling = resolve(GenerationOptions(temperature=1))
    assert names(sampling.processors) == ["TopKLogitsWarper", "GumbelNoise"]
    assert sampling.processors[0].top_k == 50


def test_the_models_own_sampling_is_followed_and_overridden_one_by_one() -> None:
    defaults = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    own = resolve(GenerationOptions(), **defaults).processors
    assert names(own) == ["TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "GumbelNoise"]
    assert (own[0].temperature, own[1].top_k, own[2].top_p) == (0.6, 20, 0.95)
    changed = resolve(GenerationOptions(top_k=0, min_p=0.1, temperature=2), **defaults).processors
    assert names(changed) == ["TemperatureLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "GumbelNoise"]
    assert changed[0].temperature == 2.0


def test_the_warpers_agree_with_transformers_own() -> None:
    """The scores that the noise is added to are those that `generate` would sample from."""
    fields = {"temperature": 0.7, "top_k": 30, "top_p": 0.8, "min_p": 0.02}
    extra = {"typical_p": 0.9, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4}
    ours = resolve(GenerationOptions(**fields, extra=extra)).processors
    model = tiny_model("llama")
    config = GenerationConfig(do_sample=True, **fields, **extra)
    theirs = model._get_logits_processor(config, device="cpu")
    scores = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.zeros(4, 1, dtype=torch.long)
    assert names(ours)[:-1] == names(theirs)
    assert torch.equal(LogitsProcessorList(ours[:-1])(ids, scores), theirs(ids, scores))


def test_lengths_and_ends() -> None:
    assert resolve(GenerationOptions()).config.max_new_tokens == DEFAULT_MAX_NEW_TOKENS
    assert resolve(GenerationOptions(), max_new_tokens=64).config.max_new_tokens == 64
    assert resolve(GenerationOptions(max_new_tokens=9), max_new_tokens=64).config.max_new_tokens == 9
    assert resolve(GenerationOptions(max_new_tokens=9), room=4).config.max_new_tokens == 4
    assert resolve(GenerationOptions()).end_ids == {7}
    assert resolve(GenerationOptions(), eos_token_id=[1, 2]).end_ids == {1, 2}
    assert resolve(GenerationOptions(), stop_strings=["a", "b"]).stop == ("a", "b")
    assert resolve(GenerationOptions(stop=("c",)), stop_strings="a").stop == ("c",)


def test_what_the_engine_decides_is_taken_out_of_the_models_config() -> None:
    config = resolve(GenerationOptions(), max_length=20, cache_implementation="hybrid", num_beams=4).config
    assert (config.max_length, config.cache_implementation, config.num_beams) == (None, None, None)


def test_extra_options_reach_generate_or_are_refused() -> None:
    assert resolve(GenerationOptions(extra={"no_repeat_ngram_size": 3})).config.no_repeat_ngram_size == 3
    for name in ("typical_p", "epsilon_cutoff", "eta_cutoff"):
        for value in (-5, 5):
            with pytest.raises(GenerationOptionError, match=f"{name}={value}"):
                resolve(GenerationOptions(temperature=1.0, extra={name: value}))
    with pytest.raises(GenerationOptionError, match="suppress_tokens"):
        resolve(GenerationOptions(extra={"forced_eos_token_id": 3, "suppress_tokens": [3]}))
