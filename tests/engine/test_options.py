"""Options are merged field by field and checked before a model is touched."""

import pytest

from turboquant_local.engine.options import check_options, merge_options
from turboquant_local.engine.types import GenerationOptions
from turboquant_local.errors import GenerationOptionError


def test_merge_keeps_what_a_call_does_not_give() -> None:
    defaults = GenerationOptions(max_new_tokens=9, temperature=0.5, stop=("a",), extra={"min_new_tokens": 2})
    merged = merge_options(defaults, GenerationOptions(temperature=0.7, extra={"no_repeat_ngram_size": 3}))
    assert merged == GenerationOptions(
        max_new_tokens=9, temperature=0.7, stop=("a",), extra={"min_new_tokens": 2, "no_repeat_ngram_size": 3}
    )
    assert merge_options(None, None) == GenerationOptions()


def test_merge_lets_a_value_of_zero_or_false_through() -> None:
    merged = merge_options(GenerationOptions(top_k=40, do_sample=True), GenerationOptions(top_k=0, do_sample=False))
    assert (merged.top_k, merged.do_sample) == (0, False)


def test_a_call_that_wants_to_sample_beats_defaults_that_do_not() -> None:
    assert merge_options(GenerationOptions(do_sample=False), GenerationOptions(temperature=0.7)).do_sample is None
    assert merge_options(GenerationOptions(temperature=0), GenerationOptions(do_sample=True)).temperature is None
    assert merge_options(GenerationOptions(do_sample=False), GenerationOptions(top_p=0.7)).do_sample is False


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected an integer of 1 or more"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"temperature": -0.1}, "temperature=-0.1: expected a number 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
        ({"top_p": 0.0}, "top_p=0.0: expected a number above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": "0.9"}, "top_p='0.9'"),
        ({"min_p": 2}, "min_p=2"),
        ({"top_k": -1}, "top_k=-1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed="),
        ({"do_sample": 1}, "do_sample=1"),
        ({"do_sample": True, "temperature": 0}, "drop one"),
        ({"stop": "END"}, "stop='END': expected a tuple"),
        ({"stop": ("",)}, "stop="),
        ({"extra": {"no_repeat_ngram": 2}}, "did you mean 'no_repeat_ngram_size'"),
        ({"extra": {"max_tokens": 2}}, "did you mean 'max_new_tokens'"),
        ({"extra": {"xyzzy": 2}}, "xyzzy: no such generation option"),
        ({"extra": {3: 2}}, "3: no such generation option"),
        ({"extra": 5}, "extra=5: expected a dict"),
        ({"template_kwargs": "x"}, "template_kwargs='x': expected a dict"),
        ({"extra": {"no_repeat_ngram_size": "2"}}, "no_repeat_ngram_size='2': expected a number"),
        ({"extra": {"temperature": 1.0}}, "use GenerationOptions(temperature=...)"),
        ({"extra": {"num_beams": 4}}, "TurboQuantCache with model.generate"),
        ({"extra": {"num_return_sequences": 2}}, "TurboQuantCache with model.generate"),
        ({"extra": {"assistant_model": object()}}, "TurboQuantCache with model.generate"),
        ({"extra": {"past_key_values": object()}}, "TurboQuantCache with model.generate"),
        ({"extra": {"use_cache": False}}, "kv_cache"),
        ({"extra": {"streamer": object()}}, "ChatEngine.stream"),
        ({"extra": {"max_length": 100}}, "use max_new_tokens"),
        ({"extra": {"stop_strings": ["a"]}}, "use stop"),
    ],
)
def test_broken_options_are_refused_with_the_way_out(fields: dict[str, object], words: str) -> None:
    with pytest.raises(GenerationOptionError) as caught:
        check_options(merge_options(None, GenerationOptions(**fields)))
    assert words in str(caught.value)


def test_options_are_no_dict() -> None:
    for options in ((None, {"seed": 1}), ({"seed": 1}, None)):
        with pytest.raises(GenerationOptionError, match=r"options=\{'seed': 1\}: expected GenerationOptions"):
            merge_options(*options)


def test_good_options_pass() -> None:
    check_options(GenerationOptions())
    check_options(
        GenerationOptions(
            max_new_tokens=1,
            temperature=0,
            top_k=0,
            top_p=1,
            min_p=0,
            repetition_penalty=1,
            seed=0,
            stop=("\n\n", "END"),
            extra={"min_new_tokens": 3, "num_beams": 1, "use_cache": True, "cache_implementation": None},
        )
    )
