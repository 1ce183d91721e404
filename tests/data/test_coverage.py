"""A tokenizer that loses bytes is found out, whichever they are."""

import json

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lazyattn.data import coverage
from lazyattn.data.codecs import read_codec
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from tests.data import real_tokenizers as real

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def _byte_level(alphabet):
    tokenizer = Library(models.BPE({piece: i for i, piece in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def _content(tokenizer):
    return tokenizer.to_str().encode()


def _piece(byte):
    """Returns the character that byte-level BPE writes for a byte."""
    tokenizer = _byte_level(ALPHABET)
    text = bytes([byte]) if byte < 0x80 else b"a" + bytes([byte])
    # Any text with the byte will do; one of two bytes begins or ends with it.
    for pair in (text, bytes([byte, 0x80]), bytes([0xC2, byte])):
        try:
            tokens = tokenizer.encode(pair.decode()).tokens
        except UnicodeDecodeError:
            continue
        return tokens[pair.index(byte)]
    raise ValueError(byte)


@pytest.mark.parametrize("byte", [0x00, 0x0A, 0x20, ord("a"), 0x7F, 0x80, 0xBF, 0xC2, 0xDF])
def test_a_single_byte_that_has_no_token_is_found(byte):
    with pytest.raises(InputError, match=r"can't represent every text: it loses .* of 2,0"):
        Tokenizer(read_codec(_content(_byte_level(set(ALPHABET) - {_piece(byte)}))))


def test_bytes_that_begin_long_characters_are_tried_too():
    """Every byte that UTF-8 has is in the characters that are tried, and no other."""
    tried = set("".join(coverage._CHARACTERS).encode())
    assert tried == {*range(0x80), *range(0x80, 0xC0), *range(0xC2, 0xF5)}
    for character in ("\U00010000", "\U00100000", "\u1000", "\uf000"):
        pieces = _byte_level(ALPHABET).encode(character).tokens
        tokenizer = _byte_level(set(ALPHABET) - {pieces[0]})
        with pytest.raises(InputError, match="such as"):
            Tokenizer(read_codec(_content(tokenizer)))


def test_what_is_lost_is_said():
    with pytest.raises(InputError) as error:
        Tokenizer(read_codec(real.without_alphabet()))
    message = str(error.value)
    assert message.startswith("The tokenizer can't represent every text: it loses 2,0")
    assert "characters tried, such as '!' (U+0021), " in message
    assert message.endswith("or have tokens for single bytes (byte_fallback).")


@pytest.mark.parametrize("options", [{}, IDENTITY])
def test_sentencepiece_without_bytes_loses_what_it_never_saw(options):
    content = real.sentencepiece(byte_fallback=False, vocab_size=100, **options)
    with pytest.raises(InputError, match="can't represent every text: it loses"):
        Tokenizer(read_codec(content))


def test_byte_fallback_without_all_bytes_is_found():
    settings = json.loads(real.llama_like()._codec.content)
    vocabulary = settings["model"]["vocab"]
    vocabulary["spare"] = vocabulary.pop("<0xC3>")
    with pytest.raises(InputError, match=r"it loses 64 of 2,0\d\d characters tried, such as 'À'"):
        Tokenizer(read_codec(json.dumps(settings).encode()))


def test_white_space_that_is_cut_away_is_lost():
    tokenizer = _byte_level(ALPHABET)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    with pytest.raises(InputError, match=r"it loses .* characters tried, such as ' ' "):
        Tokenizer(read_codec(_content(tokenizer)))


def test_a_missing_decoder_is_found():
    tokenizer = _byte_level(ALPHABET)
    tokenizer.decoder = decoders.Fuse()
    with pytest.raises(InputError, match="can't represent every text"):
        Tokenizer(read_codec(_content(tokenizer)))


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.NFC(),
        normalizers.NFKC(),
        normalizers.Lowercase(),
        normalizers.Strip(),
        normalizers.Nmt(),
    ],
)
def test_normalizers_change_text_but_lose_nothing(normalizer):
    tokenizer = _byte_level(ALPHABET)
    tokenizer.normalizer = normalizer
    found = Tokenizer(read_codec(_content(tokenizer)))
    assert found.changes_text and found.change is not None
    text, back = found.change
    assert found.decode(found.encode(text)) == back != text


@pytest.mark.parametrize(
    "make",
    [
        real.llama_like,
        real.gemma_like,
        real.across_spaces,
        real.split_by_pattern,
        lambda: real.sentencepiece_tokenizer(**IDENTITY),
        lambda: real.sentencepiece_tokenizer(model_type="unigram", **IDENTITY),
    ],
)
def test_what_keeps_everything_is_taken_without_a_word(make):
    found = make()
    assert not found.changes_text and found.change is None


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_s_own_normalizer_is_said_to_change_text(model_type):
    found = real.sentencepiece_tokenizer(model_type=model_type)
    assert found.changes_text and found.change == ("a  b", "a b")
