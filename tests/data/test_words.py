import json
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from lazyattn.data import words
from lazyattn.data.codecs import TokenizerJson
from lazyattn.data.tokenizer import Tokenizer

# What GPT-2's pattern treats in ways of its own, and what looks like it.
NASTY = [" ", "  ", "\n", "\t", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u1680"]
NASTY += [
    "\u180e",
    "\u2003",
    "\u2028",
    "\u200b",
    "\u3000",
    "\ufeff",
    "\x00",
    "'",
    "'s",
    "'ll",
    "'S",
]
NASTY += ["a", "Zz", "\xe9", "e\u0301", "\u4f60", "\u0661", "7", "00", "\xbd", "!", "...", "_"]
NASTY += ["\U0001f600", "<|eos|>", " " * 40, "\n" * 9]
texts = st.lists(st.sampled_from(NASTY) | st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.fixture(scope="module")
def codec():
    tokenizer = Tokenizer.train(["".join(NASTY) * 3, "don't  we'll\n\n\tit's   a test  " * 9], 400)
    return TokenizerJson(tokenizer._codec.content)


def _library(codec, text):
    """Returns the ids of a text by the library, whole."""
    return codec._tokenizer.encode(text, add_special_tokens=False).ids


@hypothesis.settings(max_examples=600, deadline=None, derandomize=True)
@hypothesis.given(parts=texts)
def test_ids_are_the_librarys(codec, parts):
    assert codec._words is not None
    text = "".join(parts)
    assert codec.encode_batch([text, "a", text]) == [
        _library(codec, each) for each in (text, "a", text)
    ]


AROUND = "a{}b|{}'s 7{}8 {} !{}!  {}\n{}  '{}s"


def test_many_characters(codec):
    """Each at the places where it could matter; all white space is below U+3100."""
    codes = (*range(0x800), *range(0x800, 0x3100, 5), *range(0x3100, sys.maxunicode, 971))
    spaces = (i for i in range(0x800, sys.maxunicode) if chr(i).isspace())
    characters = [chr(i) for i in (*codes, *spaces) if not 0xD800 <= i < 0xE000]
    lines = [AROUND.replace("{}", c) for c in characters]
    # Many at a time, but with nothing before that the table would hand to the library whole.
    odd = [line for line in lines if words._NO_SPACE.search(line)]
    rest = "x".join(line for line in lines if not words._NO_SPACE.search(line))
    for text in (*odd, rest):
        assert codec.encode_batch([text]) == [_library(codec, text)]


def test_a_full_table_is_forgotten(codec, monkeypatch):
    monkeypatch.setattr(words, "_LARGEST", 2000)
    other = TokenizerJson(codec.content)
    for number in range(60):
        text = f"word {number} and number {number * 7}  more"
        assert other.encode_batch([text]) == [_library(codec, text)]
        assert len(other._words._ids) < 40


def test_what_can_not_be_cut_is_left_to_the_library(codec):
    settings = json.loads(codec.content)
    assert words.can_cut(settings)
    for change in (
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {**settings["pre_tokenizer"], "add_prefix_space": True}},
        {"pre_tokenizer": {**settings["pre_tokenizer"], "use_regex": False}},
        {"pre_tokenizer": None},
        {"model": {**settings["model"], "dropout": 0.1}},
        {"added_tokens": [{**settings["added_tokens"][0], "special": False}]},
    ):
        assert not words.can_cut({**settings, **change}), change
