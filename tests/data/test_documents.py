import json

import numpy as np
import pytest

from lazyattn.data import manifest
from lazyattn.data.config import DataConfig
from lazyattn.data.documents import (
    is_prepared,
    read_prepared,
    read_texts,
    tokenize,
    validation_texts,
    wikitext_to_plain,
)
from lazyattn.data.shards import shard_name, token_dtype, write_shard
from lazyattn.data.text_files import json_lines
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from tests.eval.letters import Letters
from tests.training import tiny

PAGE = (
    ' \n = A Title = \n \n = = Section = = \n The 1 @,@ 000 well @-@ known ( or " so called " )'
    " sheep 's wool was 3 @.@ 5 ° C ; it 's not , however , [ sic ] the dogs ' fault . \n"
)


def test_pages_become_plain_text_by_the_harness_s_rules():
    found = wikitext_to_plain(PAGE)
    assert "1,000 well-known (or" in found and "3.5°C; it's not, however, [sic]" in found
    assert "== Section ==" in found and " @" not in found


def test_pages_are_what_the_harness_makes_of_them(data_folder):
    task = pytest.importorskip(
        "lm_eval.tasks.wikitext.preprocess_wikitext", reason="lm-eval is not installed"
    )
    pages = [PAGE]
    if data_folder is not None:
        lines = (data_folder / "benchmarks" / "wikitext.jsonl").read_text().splitlines()
        pages += [json.loads(line)["page"] for line in lines]
    for page in pages:
        assert wikitext_to_plain(page) == task.wikitext_detokenizer({"page": page})


def test_words_and_bytes_are_those_of_the_page(tmp_path):
    (tmp_path / "wiki.jsonl").write_text(json.dumps({"page": PAGE}) + "\n\n")
    (text,) = read_texts(str(tmp_path / "wiki.jsonl"))
    assert text.text == wikitext_to_plain(PAGE)
    assert text.bytes == len(PAGE.encode())
    assert text.words == len(PAGE.split()) + 2  # an empty one at either end


def test_files_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "b.txt").write_text("drei")
    (tmp_path / "c.jsonl").write_text('{"text": "x y z"}\n{"text": " "}\n')
    assert [t.text for t in read_texts(str(tmp_path))] == ["one two", "drei"]
    assert [(t.words, t.bytes) for t in read_texts(str(tmp_path / "a.txt"))] == [(2, 7)]
    assert [t.text for t in read_texts(str(tmp_path / "c.jsonl"))] == ["x y z"]


def test_a_run_s_own_held_out_documents(tmp_path):
    config = DataConfig(source=str(tiny.write_text(tmp_path)), validation_fraction=0.2)
    held_out = validation_texts(config)
    everything = read_texts(str(tmp_path))
    assert 0 < len(held_out) < len(everything)
    assert set(held_out) < set(everything)


def test_documents_begin_with_the_beginning_of_sequence_token(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    corpus = tokenize("x", read_texts(str(tmp_path / "a.txt")), Letters())
    np.testing.assert_array_equal(corpus.documents[0], [0, 2, 3, 4])
    assert (corpus.words, corpus.bytes) == (1, 3)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Returns a folder of shards, its tokenizer and its validation texts."""
    folder = tmp_path_factory.mktemp("shards")
    tokenizer = Tokenizer.train([tiny.TEXT], 300)
    tokenizer.save(folder / "tokenizer.json")
    texts = ["no word is worth it", "", "attention may look at nothing"]
    splits = {}
    for split in manifest.SPLITS:
        name = shard_name(split, 0, 1)
        documents = [(tokenizer.encode(text), len(text.encode())) for text in texts]
        splits[split] = manifest.Split(
            (write_shard(folder / name, documents, token_dtype(tokenizer.vocab_size)),)
        )
    record = manifest.TokenizerRecord(
        kind=tokenizer.kind,
        file="tokenizer.json",
        sha256=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        beginning_of_document=tokenizer.bos_id,
        end_of_document=tokenizer.eos_id,
        padding=tokenizer.pad_id,
    )
    content = manifest.Manifest("test", record, "uint16", splits, (), {}, {})
    (folder / manifest.NAME).write_text(content.to_json())
    return folder, tokenizer, texts


def test_prepared_shards(prepared, tmp_path):
    folder, tokenizer, texts = prepared
    assert is_prepared(str(folder)) and not is_prepared(str(tmp_path))
    corpus = read_prepared("x", [str(folder)], tokenizer)
    expected = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts if text]
    assert [document.tolist() for document in corpus.documents] == expected
    assert corpus.words == sum(len(text.split()) for text in texts)
    assert corpus.bytes == sum(len(text) for text in texts)
    assert len(read_prepared("x", [str(folder)], tokenizer, limit=1).documents) == 1


def test_shards_of_another_tokenizer_are_refused(prepared):
    other = Tokenizer.train(["something else"], 280)
    with pytest.raises(InputError, match="was prepared with another tokenizer than the run was"):
        read_prepared("x", [str(prepared[0])], other)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "--text is .*none.txt', but it must be a .txt or .jsonl file, or a "),
        ("a.csv", b"x", "--text is .*a.csv', but it must be a .txt or .jsonl file"),
        ("a.txt", b" \n", "--text is .*a.txt', but there is no text in it"),
        ("a.txt", b"\xff", "--text is .*a.txt', which is not UTF-8 at byte 0"),
        ("a.jsonl", b"", "--text is .*a.jsonl', but there is no text in it"),
        ("a.jsonl", b'{"text": ""}', "--text is .*a.jsonl', but there is no text in it"),
        ("a.jsonl", b'{"text": "x"}\n{"t": 1}', "whose line 2 is no JSON object with a string pa"),
        ("a.jsonl", b"not json", "whose line 1 is no JSON object"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_texts(str(path))


def test_lines_name_the_flag_they_belong_to(tmp_path):
    (tmp_path / "l.jsonl").write_text("3\n")
    with pytest.raises(InputError, match=r"^--lambada is .*, whose line 1 is no JSON object with"):
        list(json_lines(tmp_path / "l.jsonl", "--lambada", ("text",)))
