import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from lazyattn.data import tokenizer as tokenizer_module
from lazyattn.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from lazyattn.errors import InputError

TEXTS = [
    "Attention that is allowed to look at nothing.",
    "The model looks at the words that matter, and the rest of them get no weight at all.",
    "Caf\u00e9 and \u4f60\u597d, \U0001f600; the theatre there, then the other.",
] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 320)


def test_special_tokens_have_fixed_ids(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 320


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(st.text() | st.text(alphabet=" \n'aeth<|>bos\u0301"))
def test_text_comes_back_and_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())
    assert not set(ids) & {0, 1, 2}


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_text_cannot_forge_a_special_token(tokenizer, token):
    ids = tokenizer.encode(f"a{token} b")
    assert min(ids) > 2
    assert tokenizer.decode(ids) == f"a{token} b"


def test_decode_leaves_special_tokens_out(tokenizer):
    ids = np.asarray([1, *tokenizer.encode("the end"), 2, 0], np.int32)
    assert tokenizer.decode(ids) == "the end"


def test_merges_are_learned(tokenizer):
    text = "the model looks at the words"
    assert len(tokenizer.encode(text)) < 0.7 * len(text)
    assert tokenizer.bytes_per_token.max() > 2
    assert tokenizer.bytes_per_token.dtype == np.int32
    assert tokenizer.bytes_per_token.shape == (320,)
    np.testing.assert_array_equal(tokenizer.bytes_per_token[:3], 0)
    assert (tokenizer.bytes_per_token[3:] > 0).all()


def test_a_batch_is_each_text_by_itself(tokenizer):
    texts = ["", *TEXTS]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_training_is_the_same_in_another_process(tokenizer):
    program = (
        "import sys; from lazyattn.data.tokenizer import Tokenizer;"
        "print(Tokenizer.train(eval(sys.argv[1]), 320).fingerprint)"
    )
    command = [sys.executable, "-c", program, ascii(TEXTS)]
    other = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert other.strip() == tokenizer.fingerprint


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("the <|eos|>") == tokenizer.encode("the <|eos|>")
    assert Tokenizer.train(TEXTS[:1], 320).fingerprint != tokenizer.fingerprint


def test_a_byte_order_mark_is_skipped_and_kept(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a.json")
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.json").read_bytes())
    marked = Tokenizer.load(tmp_path / "b.json")
    assert marked.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])
    assert marked.bytes_per_token.tolist() == tokenizer.bytes_per_token.tolist()
    marked.save(tmp_path / "c.json")
    assert Tokenizer.load(tmp_path / "c.json").fingerprint == marked.fingerprint


def test_a_small_vocabulary_has_no_room():
    with pytest.raises(InputError, match=r"^vocab_size is 258, but it must be at least 259\.$"):
        Tokenizer.train(TEXTS, 258)


def test_loading_nothing_or_garbage(tmp_path):
    with pytest.raises(InputError, match=r"'.*none\.json' cannot be read \(No such file"):
        Tokenizer.load(tmp_path / "none.json")
    for garbage in (b"{}", b"\xff", b""):
        (tmp_path / "bad.json").write_bytes(garbage)
        with pytest.raises(InputError, match=r"'.*bad\.json' is neither a tokenizer\.json nor"):
            Tokenizer.load(tmp_path / "bad.json")


def _foreign(tmp_path, change):
    Tokenizer.train(TEXTS, 300).save(tmp_path / "foreign.json")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "foreign.json"))
    change(tokenizer)
    tokenizer.save(str(tmp_path / "foreign.json"))
    return tmp_path / "foreign.json"


def _prefix_space(tokenizer):
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)


def _normalizer(tokenizer):
    tokenizer.normalizer = tokenizers.normalizers.NFKC()


@pytest.mark.parametrize(
    ("change", "example"),
    [
        (_prefix_space, '"Don\'t" comes back as " Don\'t"'),
        (_normalizer, r"'e\u0301' comes back as '\xe9'"),
    ],
)
def test_a_tokenizer_that_changes_text_says_so_once(tmp_path, change, example, caplog, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_warned", set())
    for _ in range(2):
        assert Tokenizer.load(_foreign(tmp_path, change)).changes_text
    (record,) = caplog.records
    assert example in record.getMessage()


def test_truncation_and_padding_are_switched_off(tmp_path):
    def change(tokenizer):
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=4)

    loaded = Tokenizer.load(_foreign(tmp_path, change))
    assert loaded.decode(loaded.encode(TEXTS[0])) == TEXTS[0]
    assert 0 not in loaded.encode("a")
    assert not loaded.changes_text


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.add_special_tokens(["<|pad|>", "<|bos|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"has no token <\|eos\|> for the end of a document"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def _byte_level(special, add):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *special])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(add)
    return tokenizer


def test_special_tokens_of_other_names(tmp_path):
    """As GPT-2's: one token ends a document, begins the next and pads."""
    tokenizer = _byte_level([], ["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.pad_id == loaded.bos_id == loaded.eos_id == 256
    assert loaded.vocab_size == 257
    assert 256 not in loaded.encode("<|endoftext|>")
    # A piece of text that looks like one is none: "<s>" was merged from HTML, say.
    tokenizer = _byte_level(["<s>", "</s>"], ["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path / "tokenizer.json").bos_id == 258


def test_words_alone_are_refused(tmp_path):
    model = tokenizers.models.WordLevel({"the": 0, "[UNK]": 1}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="The tokenizer can't represent every text"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def _sentencepiece(path, **options):
    sentencepiece = pytest.importorskip("sentencepiece")
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=file,
            vocab_size=340,
            hard_vocab_limit=False,
            minloglevel=2,
            num_threads=1,
            **options,
        )
    return path


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece(tmp_path, model_type):
    path = _sentencepiece(
        tmp_path / "a.model",
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.kind, tokenizer.file_name) == ("sentencepiece", "tokenizer.model")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert not tokenizer.changes_text
    for text in ["", *TEXTS, "a </s> b", "\n\t two  spaces "]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {1, 2} & set(ids)
        added = 1 if text else 0  # the space in front of every text
        assert tokenizer.bytes_per_token[ids].sum() == len(text.encode()) + added
    tokenizer.save(tmp_path / "b.model")
    again = Tokenizer.load(tmp_path / "b.model")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode_batch(TEXTS[:2]) == [tokenizer.encode(text) for text in TEXTS[:2]]


def test_sentencepiece_with_its_defaults_changes_text(tmp_path):
    tokenizer = Tokenizer.load(_sentencepiece(tmp_path / "a.model", byte_fallback=True))
    assert tokenizer.changes_text


def test_sentencepiece_without_bytes_is_refused(tmp_path):
    path = _sentencepiece(tmp_path / "a.model")
    with pytest.raises(InputError, match="The tokenizer can't represent every text"):
        Tokenizer.load(path)
