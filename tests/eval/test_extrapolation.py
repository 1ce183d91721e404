"""Rolling perplexity and LAMBADA against sums taken by hand."""

import functools
import json

import jax
import numpy as np
import pytest

from lazyattn.data.documents import Text, tokenize
from lazyattn.errors import InputError
from lazyattn.eval.extrapolation import as_data, as_table, check, draw, extrapolate
from lazyattn.eval.lambada import Passage, read_lambada, score_lambada, tokenize_passages
from lazyattn.eval.scoring import Scorer
from lazyattn.sharding import MeshConfig, make_mesh
from tests.data import real_tokenizers
from tests.eval.letters import Letters
from tests.model.tiny import make_config, make_params

CONFIG = make_config()
MESH = make_mesh(MeshConfig(), jax.devices()[:1])
TEXTS = [Text("attention may look at nothing", 5, 29), Text("no word is worth it", 5, 19)]
PASSAGES = ["the weight of a glance", "no word is worth the weight", "so it is"]


@functools.cache
def _scorer():
    return Scorer(make_params(CONFIG), CONFIG, MESH, batch_tokens=128)


@functools.cache
def _results(stride=None):
    corpus = tokenize("text", TEXTS, Letters())
    passages = tokenize_passages(PASSAGES, Letters())
    return extrapolate(_scorer(), [corpus], passages, [32, 16], stride)


def _nll(tokens, context):
    """Returns each token's nll given all that a context has room for."""
    rows = [tokens[max(0, i - context) : i + 1] for i in range(1, len(tokens))]
    return [score.nll[-1] for score in _scorer()(rows, context=32)]


def test_a_stride_of_one_gives_every_token_a_full_context():
    texts, _ = _results(stride=1)
    nll = sum(sum(_nll([0, *Letters().encode(text.text)], 16)) for text in TEXTS)
    found = texts[0]
    assert (found.context, found.stride) == (16, 1)
    assert (found.tokens, found.words, found.bytes, found.documents) == (48, 10, 48, 2)
    assert found.loss == pytest.approx(nll / 48, rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(nll / 48), rel=1e-5)
    assert found.word_perplexity == pytest.approx(np.exp(nll / 10), rel=1e-5)
    assert found.byte_perplexity == pytest.approx(np.exp(nll / 48), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nll / np.log(2) / 48, rel=1e-5)


def test_contexts_come_in_order_and_differ_where_documents_are_longer():
    texts, lambada = _results()
    assert [(r.context, r.stride) for r in texts] == [(16, 16), (32, 32)]
    assert texts[0].loss != texts[1].loss
    assert [r.context for r in lambada] == [16, 32]


def test_lambada_is_about_last_words_alone():
    _, lambada = _results()
    nll, right = [], []
    for passage in PASSAGES:
        tokens = [0, *Letters().encode(passage)]
        word = len(passage) - passage.rindex(" ")  # a letter a token, and the space
        (score,) = _scorer()([tokens], context=32)
        nll.append(score.nll[-word:].sum())
        right.append(score.greedy[-word:].all())
    assert lambada[1].perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert lambada[1].accuracy == np.mean(right)
    assert lambada[1].passages == 3


def test_a_passage_longer_than_the_context_loses_its_beginning():
    passages = tokenize_passages(PASSAGES, Letters())
    cut = [Passage(passage.tokens[-17:], passage.word) for passage in passages]
    found = score_lambada(_scorer(), cut, 32)
    assert found.perplexity == pytest.approx(_results()[1][0].perplexity, rel=1e-5)


def test_right_answers_are_counted():
    tokens = [0, 2, 3]
    for _ in range(6):  # greedy decoding by trying every letter
        rows = [[*tokens, letter] for letter in range(31)]
        scores = _scorer()(rows, context=32)
        (best,) = [row[-1] for row, score in zip(rows, scores, strict=True) if score.greedy[-1]]
        tokens.append(best)
    wrong = [*tokens[:-1], (tokens[-1] + 1) % 31]
    found = score_lambada(_scorer(), [Passage(tokens, 6), Passage(wrong, 6)], 32)
    assert found.accuracy == 0.5


def test_table_data_and_picture(tmp_path):
    texts, lambada = _results()
    table = as_table(texts, lambada, trained=16)
    assert "| text | 16 | 16 |" in table and "| text | 32 * | 32 |" in table
    assert "longer than the rows of 16 tokens" in table
    assert "longer than" not in as_table(texts, lambada, trained=32)
    data = json.loads(json.dumps(as_data(texts, lambada, 16)))
    assert data["trained_context"] == 16
    assert data["texts"][1]["bits_per_byte"] == texts[1].bits_per_byte
    assert data["lambada"][0]["passages"] == 3
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert draw(texts, lambada, 16, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_bad_strides_and_contexts():
    with pytest.raises(InputError, match="--stride is 17, but it must be from 1 to the shortest"):
        extrapolate(_scorer(), [], [], [32, 16], 17)
    with pytest.raises(InputError, match="the context is 3, but it must be at least 7, the longe"):
        score_lambada(_scorer(), tokenize_passages(PASSAGES, Letters()), 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", "a b", "--lambada is .*l.txt', but it must be a .jsonl file"),
        ("l.jsonl", None, "--lambada is .*l.jsonl', but it must be a .jsonl file"),
        ("l.jsonl", "", "--lambada is .*l.jsonl', but there is no passage in it"),
        ("l.jsonl", '{"text": " word "}', "a passage in it is 'word', which has no last word"),
    ],
)
def test_bad_lambada_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_lambada(str(tmp_path / name))


def test_a_last_word_that_merges_into_its_context_is_refused():
    tokenizer = real_tokenizers.across_spaces()
    passages = ["the door by", "Attention. the cat sat on"]
    assert len(tokenizer.encode(passages[1])) <= len(tokenizer.encode("Attention. the cat sat"))
    with pytest.raises(InputError) as error:
        tokenize_passages(passages, tokenizer)
    assert str(error.value) == (
        "Passage 2 of --lambada ends in 'Attention. the cat sat on', whose last word the tokenizer"
        " merges into what comes before it, so there is nothing to score."
    )
    none = Passage([0, 2, 3], 0)
    for measure in (lambda: score_lambada(_scorer(), [none], 8), lambda: check([none], [8], None)):
        with pytest.raises(InputError, match="tokens of a passage's last word is 0, but it must"):
            measure()


def test_documents_of_which_nothing_is_left_are_left_out():
    """SentencePiece's defaults take a zero-width space away."""
    tokenizer = real_tokenizers.sentencepiece_tokenizer()
    empty, some = Text("\u200b", 1, 3), Text("the cat", 2, 7)
    assert tokenizer.encode(empty.text) == []
    corpus = tokenize("x", [empty, some, empty], tokenizer)
    assert len(corpus.documents) == 1 and (corpus.words, corpus.bytes) == (2, 7)
    with pytest.raises(InputError, match="The text 'x' has no document of which the tokenizer kee"):
        tokenize("x", [empty], tokenizer)
