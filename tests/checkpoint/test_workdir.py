import os

import pytest

from lazyattn.checkpoint.workdir import find_tokenizer, keep_tokenizer
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError


def _trained(path):
    return Tokenizer.train(["some words of a text"], 262)


def _sentencepiece(path):
    sentencepiece = pytest.importorskip("sentencepiece")
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words of a text"] * 9),
            model_writer=file,
            vocab_size=300,
            hard_vocab_limit=False,
            byte_fallback=True,
            minloglevel=2,
        )
    return Tokenizer.load(path)


@pytest.mark.parametrize(
    ("make", "name"), [(_trained, "tokenizer.json"), (_sentencepiece, "tokenizer.model")]
)
def test_tokenizers_of_both_kinds_are_kept(tmp_path, make, name):
    tokenizer = make(tmp_path / "made")
    workdir = tmp_path / "run"
    workdir.mkdir()
    assert find_tokenizer(workdir) is None
    for _ in range(2):
        keep_tokenizer(workdir, tokenizer)
        assert os.listdir(workdir) == [name]
        assert Tokenizer.load(find_tokenizer(workdir)).fingerprint == tokenizer.fingerprint
    with pytest.raises(InputError, match=rf"{name} is not the tokenizer of this data"):
        keep_tokenizer(workdir, Tokenizer.train(["other"], 261))
