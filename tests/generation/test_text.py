"""Texts instead of tokens: the same continuations, cut at stop strings and as they come."""

import functools
import itertools

import jax
import numpy as np
import pytest

from lazyattn.errors import InputError
from lazyattn.generation.decode import generate
from lazyattn.generation.sampling import SamplingConfig
from lazyattn.generation.text import _certain, generate_text, stream_text
from tests.data import real_tokenizers
from tests.eval.letters import Letters
from tests.model.tiny import make_config, make_params

CONFIG = make_config()
KEY = jax.random.key(0)
GREEDY = SamplingConfig(max_new_tokens=6, temperature=0.0)
PROMPTS = ["hello", "", "abc"]
DRAW = SamplingConfig(max_new_tokens=16, temperature=1.5, top_k=20, min_p=0.01)


@functools.cache
def _params():
    return make_params(CONFIG)


@functools.cache
def _drawn():
    return generate_text(_params(), CONFIG, Letters(), PROMPTS, sampling=DRAW, key=KEY)


def test_text_in_text_out():
    together = _drawn()
    assert len(together) == 3 and all(isinstance(text, str) for text in together)
    prompts = np.zeros((3, 32), np.int32)
    for row, text in zip(prompts, PROMPTS, strict=True):
        row[1 : len(text) + 1] = Letters().encode(text)
    ids = generate(
        _params(), CONFIG, prompts, np.array([6, 1, 4]), sampling=DRAW, key=KEY, eos_id=1
    )
    expected = [
        Letters().decode(row[:n])
        for row, n in zip(np.asarray(ids.tokens), np.asarray(ids.lengths), strict=True)
    ]
    assert together == expected


def test_a_stream_grows_into_the_same_texts():
    run = functools.partial(stream_text, _params(), CONFIG, Letters(), PROMPTS, sampling=DRAW)
    for every in (1, 5):
        steps = list(run(key=KEY, every=every))
        assert steps[-1] == _drawn()
        for before, after in itertools.pairwise(steps):
            for short, long in zip(before, after, strict=True):
                assert long.startswith(short)
        assert len(steps) >= 16 // every


def test_texts_end_before_the_first_stop_string():
    whole = _drawn()
    stop = [whole[0][7:10], whole[2][4:6]]
    assert all(len(string) > 1 for string in stop)
    expected = []
    for text in whole:
        cuts = [text.find(string) for string in stop if string in text]
        expected.append(text[: min(cuts, default=len(text))])
    run = functools.partial(stream_text, _params(), CONFIG, Letters(), PROMPTS, sampling=DRAW)
    for every in (1, 4):
        steps = list(run(key=KEY, stop=stop, every=every))
        assert steps[-1] == expected
        for texts in steps:
            assert all(e.startswith(t) for e, t in zip(expected, texts, strict=True))
    found = generate_text(_params(), CONFIG, Letters(), PROMPTS, sampling=DRAW, key=KEY, stop=stop)
    assert found == expected


def test_what_may_still_change_is_held_back():
    assert _certain("one \n", ["\n\n"]) == "one "
    assert _certain("one Q", ["Q:", "x"]) == "one "
    assert _certain("one Qu", ["Q:", "x"]) == "one Qu"


def test_no_prompt_at_all_and_bad_stop_strings():
    run = functools.partial(generate_text, _params(), CONFIG, Letters(), sampling=GREEDY, key=KEY)
    with pytest.raises(InputError, match="There is no prompt"):
        run([])
    with pytest.raises(InputError, match="a stop string is '', but it must be a text of at least"):
        run(["a"], stop=["a", ""])


KINDS = {
    "llama": real_tokenizers.llama_like,
    "sentencepiece": lambda: real_tokenizers.sentencepiece_tokenizer(
        normalization_rule_name="identity", remove_extra_whitespaces=False
    ),
}
REAL = make_config(vocab_size=400)


@functools.cache
def _real(kind):
    return KINDS[kind](), make_params(REAL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_continuation_are_the_decoding_of_all_ids(kind):
    tokenizer, params = _real(kind)
    prompts = ["the cat"] * 46 + ["", "caf\u00e9 "]
    draw = SamplingConfig(max_new_tokens=8, temperature=1.0)
    encoded = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    padded = np.zeros((len(prompts), 32), np.int32)
    for row, ids in zip(padded, encoded, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids in encoded])
    new = generate(params, REAL, padded, lengths, sampling=draw, key=KEY, eos_id=tokenizer.eos_id)
    wholes = [
        tokenizer.decode([*ids, *row[:n]])
        for ids, row, n in zip(encoded, np.asarray(new.tokens), new.lengths, strict=True)
    ]
    run = functools.partial(stream_text, params, REAL, tokenizer, prompts, sampling=draw, key=KEY)
    for every in (1, 3):
        steps = list(run(every=every))
        texts = steps[-1]
        assert [p + text for p, text in zip(prompts, texts, strict=True)] == wholes
        for before, after in itertools.pairwise(steps):
            assert all(a.startswith(b) for b, a in zip(before, after, strict=True))
    # Stop strings that begin with the space of a word; one with that of the first word.
    first = next(text[:2] for text in texts if text[:1] == " " and text[1:])
    spaces = [text[text.find(" ") :][:3] for text in texts if " " in text[1:]]
    for stop in (first, spaces[-1]):
        expected = [text.partition(stop)[0] for text in texts]
        assert stop != first or "" in expected
        for every in (1, 3):
            assert list(run(every=every, stop=[stop]))[-1] == expected


def test_texts_that_are_not_unicode_are_refused():
    run = functools.partial(generate_text, _params(), CONFIG, Letters(), sampling=GREEDY, key=KEY)
    with pytest.raises(InputError, match=r"The prompt 'a.udcff' is not valid Unicode: character 1"):
        run(["a", "a\udcff"])
    with pytest.raises(InputError, match=r"The stop string .* is not valid Unicode"):
        run(["a"], stop=["\ud800"])
