"""What tasks say of a continuation: what asks for nothing is taken, what can't be done is not."""

import pytest

from lazyattn.errors import InputError
from lazyattn.eval.generation_settings import read_settings
from lazyattn.generation.sampling import SamplingConfig

GREEDY = SamplingConfig(max_new_tokens=9, temperature=0.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1},
        {"num_return_sequences": 1, "n": 1, "best_of": 1},
        {"seed": 1234},
        {"do_sample": False, "temperature": 0.7, "top_p": 0.0, "top_k": -1, "typical_p": 0.3},
        {"early_stopping": True, "length_penalty": 2.0, "use_cache": False},
        {"no_repeat_ngram_size": 0, "min_new_tokens": 0, "presence_penalty": 0.0},
        {"max_length": None, "num_beams": None, "until": None, "temperature": None},
        {"repetition_penalty": 1.0, "skip_special_tokens": True},
        {"temperature": 0},
        {"do_sample": True, "temperature": 0.0},
    ],
)
def test_what_asks_for_nothing_is_taken(settings):
    found = read_settings({"until": ["\n", None, ""], **settings}, 9)
    assert found.sampling == GREEDY
    assert found.stop == (["\n"] if settings.get("until", "") is not None else [])
    assert found.seed == settings.get("seed")


def test_what_asks_for_something_is_done():
    found = read_settings(
        {
            "until": "Q:",
            "do_sample": True,
            "temperature": "0.5",
            "top_p": 0.9,
            "top_k": 4.0,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "max_new_tokens": 3,
            "max_gen_toks": 5,
            "seed": 7,
        },
        9,
    )
    assert found == (SamplingConfig(5, 0.5, 0.9, 4, 0.1, 1.2), ["Q:"], 7)
    assert read_settings({"temperature": 0.8, "top_k": -1}, 9).sampling.temperature == 0.8
    assert read_settings({"do_sample": True}, 9).sampling == SamplingConfig(9)
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert read_settings({name: 3}, 9).sampling.max_new_tokens == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 10}, "The generation setting num_beams of x is 10, but it must be 1 here."),
        ({"num_return_sequences": 2}, "setting num_return_sequences of x is 2, but it must be 1 h"),
        ({"no_repeat_ngram_size": 3}, "setting no_repeat_ngram_size of x is 3, but it must be 0 h"),
        ({"max_length": 50}, "max_length of x is 50, but it is unknown; it must be one of until, "),
        ({"do_sample": True, "typical_p": 0.5}, "typical_p of x is 0.5, but it must be 1 here"),
        ({"temperature": "warm"}, "temperature of x is 'warm', but it must be a number"),
        ({"do_sample": True, "top_k": 1.5}, "top_k of x is 1.5, but it must be a whole number"),
        ({"do_sample": True, "top_p": 2}, "generation setting of x is wrong: top_p is 2.0, but it"),
        ({"max_gen_toks": 0}, "setting of x is wrong: max_new_tokens is 0, but it must be from 1 "),
        ({"until": 3}, "until of x is 3, but it must be a text or a list of texts"),
        ({"until": ["a", 3]}, "until of x is ..a., 3., but it must be a text or a list of texts"),
        ({"seed": "x"}, "seed of x is 'x', but it must be a number"),
    ],
)
def test_what_can_not_be_done_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        read_settings(settings, 9, "x")
