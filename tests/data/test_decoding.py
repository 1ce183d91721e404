"""A prompt and its continuation are the decoding of all ids, however they come."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from lazyattn.data import decoding
from lazyattn.data.decoding import Continuation
from tests.data import real_tokenizers as real

IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS = {
    "llama": real.llama_like,
    "gemma": real.gemma_like,
    "byte-level": real.across_spaces,
    "sentencepiece": lambda: real.sentencepiece_tokenizer(**IDENTITY),
    "sentencepiece unigram": lambda: real.sentencepiece_tokenizer(model_type="unigram", **IDENTITY),
    "sentencepiece with its defaults": real.sentencepiece_tokenizer,
}
PROMPTS = ["the cat", "", " the", "the cat ", "\u00e9", "caf\u00e9", "a\n", "\U0001f600"]


@functools.cache
def _tokenizer(kind):
    return KINDS[kind]()


def _added(tokenizer, before, new, prompt=None):
    return Continuation(tokenizer, before, prompt).text(new)


@pytest.fixture(scope="module", params=[1, 64], autouse=True)
def tail(request):
    """Tokens of a prompt that are looked at again."""
    before, decoding._TAIL = decoding._TAIL, request.param
    yield request.param
    decoding._TAIL = before


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_space_stays(kind):
    tokenizer = _tokenizer(kind)
    before = [tokenizer.bos_id, *tokenizer.encode("the door")]
    new = tokenizer.encode("the door sat")[len(before) - 1 :]
    assert _added(tokenizer, before, new, "the door") == " sat"
    assert _added(tokenizer, before, new) == " sat"
    assert _added(tokenizer, [tokenizer.bos_id], tokenizer.encode("the door")) == "the door"


def test_white_space_that_the_tokenizer_left_out_is_not_repeated():
    tokenizer = _tokenizer("sentencepiece with its defaults")
    before = [tokenizer.bos_id, *tokenizer.encode("the cat ")]
    ids = tokenizer.encode("the cat sat")[len(before) - 1 :]
    assert tokenizer.decode([*before, *ids]) == "the cat sat"
    assert _added(tokenizer, before, ids, "the cat ") == "sat"
    assert _added(tokenizer, before, [], "the cat ") == ""


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=60)
@hypothesis.given(data=st.data())
def test_together_they_are_the_decoding_of_all_ids(kind, data):
    """Any ids that a model may draw, bytes that are no character among them."""
    tokenizer = _tokenizer(kind)
    prompt = data.draw(st.sampled_from(PROMPTS))
    ids = st.integers(0, tokenizer.vocab_size + 9)  # a model may have room for more
    single = st.sampled_from(tokenizer.encode("\u00e9\u4f60\U0001f600"))
    new = data.draw(st.lists(ids | single, max_size=12))
    before = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    whole = tokenizer.decode([*before, *new])
    follows = Continuation(tokenizer, before, prompt)
    final = follows.text(new)
    if whole.startswith(prompt):
        assert prompt + final == whole
    elif whole.startswith(start := tokenizer.decode(before)) and not prompt.startswith(whole):
        assert start + final == whole
    shown = [follows.settled(new[:n]) for n in range(len(new) + 1)]
    for short, long in itertools.pairwise([*shown, final]):
        assert long.startswith(short)


def test_bytes_that_may_become_unreadable_are_held_back():
    """Llama's decoder loses a whole run of bytes to one that doesn't belong."""
    tokenizer = _tokenizer("llama")
    before = [tokenizer.bos_id, *tokenizer.encode("the")]
    word = tokenizer.encode("\u00e9")[-2:]
    assert tokenizer.unsettled([*before, *word]) == 2
    assert Continuation(tokenizer, before).settled(word) == ""
    assert _added(tokenizer, before, word) == "\u00e9"
    assert _added(tokenizer, before, [*word, word[0]]) == "\ufffd" * 3
    after = tokenizer.encode("the cat")[1:]
    assert Continuation(tokenizer, before).settled([*word, *after]) == "\u00e9 cat"
    assert _tokenizer("sentencepiece").unsettled(word) == 0
