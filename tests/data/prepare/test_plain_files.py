"""Text, JSON and tables as inputs, and validation files of their own."""

import csv
import hashlib
import json

import pytest

from lazyattn.data import manifest
from lazyattn.data.parquet import DamagedFileError
from lazyattn.data.prepare import __main__ as command
from lazyattn.data.prepare import readers
from lazyattn.data.prepare.inputs import make_plan
from lazyattn.data.prepare.readers import read_unit
from lazyattn.data.prepare.run import Preparation, prepare_shards
from lazyattn.data.prepare.selection import INVALID_JSON, Selection, select
from lazyattn.data.shards import Shards
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from tests.data.prepare.corpora import make_documents, write_jsonl

SELECTION = Selection()


def _write_csv(path, documents, fields=("id", "text", "int_score")):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(documents)
    return path


def _rows(path, selection=SELECTION):
    return [
        r for u in make_plan([str(path)], selection, 10**6).units for r in read_unit(u, selection)
    ]


def _texts(folder, split):
    tokenizer = Tokenizer.load(folder / manifest.read(folder).tokenizer.file)
    return [tokenizer.decode(ids) for ids in Shards(folder, split)]


@pytest.fixture(params=["array", "lines", "pretty"])
def written_json(request, tmp_path):
    documents = [*make_documents(70), {"id": "u", "text": 'a "]" \u2028 [,] \\'}]
    text = {
        "array": json.dumps(documents),
        "lines": "\n".join(map(json.dumps, documents)),
        "pretty": "\n\n".join(json.dumps(d, indent=2) for d in documents),
    }[request.param]
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + text + "\n", encoding="utf-8")
    return path, documents


@pytest.mark.parametrize("buffer", [7, 1 << 20])
def test_json_of_any_shape(written_json, buffer, monkeypatch):
    monkeypatch.setattr(readers, "_BUFFER", buffer)
    path, documents = written_json
    rows = _rows(path)
    assert [(row.id, row.text) for row in rows] == [(d["id"], d["text"]) for d in documents]
    assert [row.place for row in rows] == list(range(71))


def test_json_that_is_none(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"id": "a", "text": "b"}, 7, "x", {"id": "c"')
    (unit,) = make_plan([str(path)], SELECTION, 10**6).units
    found = []
    with pytest.raises(DamagedFileError, match="no JSON"):
        found.extend(row for row in read_unit(unit, SELECTION))
    found = []
    try:
        for row in read_unit(unit, SELECTION):
            found.append(row.fault)
    except DamagedFileError:
        pass
    assert found == [None, INVALID_JSON, INVALID_JSON]


def test_tables(tmp_path):
    documents = make_documents(50)
    documents[3]["text"] = 'two\nlines, "quoted"\r\nand \u2028 more'
    path = _write_csv(tmp_path / "a.csv", documents)
    rows = _rows(path, Selection(min_int_score=3))
    assert [(r.id, r.text, r.score) for r in rows] == [
        (d["id"], d["text"], d["int_score"]) for d in documents
    ]
    with pytest.raises(
        InputError, match=r"--text_field is 'body', but .*a\.csv has no such column"
    ):
        make_plan([str(path)], Selection(text_field="body"), 10**6)
    path.write_bytes(b"id,text\n1,good\n2,b\xffd\n3,good too\n")
    chosen = [select(r.text, r.id, r.score, SELECTION) for r in _rows(path)]
    assert [isinstance(each, str) for each in chosen] == [False, True, False]
    path.write_bytes(b'id,text\n1,good\n2,"cut off')
    with pytest.raises(DamagedFileError, match="unexpected end"):
        _rows(path)


def test_files_of_text(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.txt").write_bytes(b"\xef\xbb\xbf" + f"text {number}\r\n".encode())
    (tmp_path / "5.txt").write_text("")
    plan = make_plan([str(tmp_path)], SELECTION, 10**6)
    assert len(plan.units) == 1 and len(plan.files) == 9  # many files are one piece of work
    rows = list(read_unit(plan.units[0], SELECTION))
    assert [row.text for row in rows] == [f"text {n}\r\n".encode() for n in range(9) if n != 5]
    assert rows[0].id == hashlib.sha256(b"text 0\r\n").hexdigest()
    assert plan.units[0].name(2) == str(tmp_path / "2.txt") and rows[-1].done == 1
    assert len(make_plan([str(tmp_path)], SELECTION, 10).units) == 8
    with pytest.raises(InputError, match=r"--min_int_score is 3, but .*0\.txt is a \.txt file"):
        make_plan([str(tmp_path)], Selection(min_int_score=3), 10**6)


def test_notes_beside_a_corpus_are_not_read(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_documents(5))
    (tmp_path / "notes.txt").write_text("of the user")
    (tmp_path / "dataset_card.json").write_text("{}")
    assert [f.file for f in make_plan([str(tmp_path)], SELECTION, 10**6).files] == ["a.jsonl"]
    both = make_plan([str(tmp_path), f"{tmp_path}/*.txt"], SELECTION, 10**6)
    assert [f.file for f in both.files] == ["a.jsonl", "notes.txt"]


@pytest.fixture
def split(tmp_path):
    train, held_out = make_documents(60, 1), make_documents(20, 2)
    write_jsonl(tmp_path / "in" / "train.jsonl", train)
    _write_csv(tmp_path / "in" / "held_out.csv", held_out)
    return tmp_path, [d["text"] for d in train], [d["text"] for d in held_out]


def test_validation_files(split):
    folder, train, held_out = split
    preparation = Preparation(
        inputs=(str(folder / "in" / "train.jsonl"),),
        validation_inputs=(str(folder / "in" / "held_out.csv"),),
        output=str(folder / "out"),
        tokenizer="train",
        vocab_size=300,
        num_workers=1,
    )
    prepared = prepare_shards(preparation)
    assert _texts(prepared.folder, "train") == train
    assert _texts(prepared.folder, "validation") == held_out
    assert prepared.manifest.settings["validation_files"] == ["held_out.csv"]
    assert prepare_shards(preparation).finished_before
    assert Tokenizer.train(train, 300).fingerprint == prepared.manifest.tokenizer.sha256
    other = Preparation(**{**preparation.__dict__, "validation_inputs": ()})
    with pytest.raises(InputError, match="from other files"):
        prepare_shards(other)
    twice = {**preparation.__dict__, "validation_inputs": (str(folder / "in" / "train.jsonl"),)}
    with pytest.raises(InputError, match=r"--validation_input has '.*', which --input has, too"):
        prepare_shards(Preparation(**{**twice, "output": str(folder / "new")}))


def test_validation_files_and_a_share_are_refused(split, monkeypatch, capsys):
    folder, _, _ = split
    argv = ["prepare", f"--input={folder}/in/train.jsonl", f"--output={folder}/out"]
    argv += [f"--validation_input={folder}/in/held_out.csv", "--validation_fraction=0.1"]
    argv += ["--tokenizer=train"]
    monkeypatch.setattr(command, "FLAGS", command.FLAGS)
    command.FLAGS(argv)
    try:
        with pytest.raises(
            InputError, match=r"--validation_fraction is 0\.1, but --validation_inp"
        ):
            command._prepare()
    finally:
        command.FLAGS.unparse_flags()
        for name in ("input", "output", "validation_input", "validation_fraction", "tokenizer"):
            command.FLAGS[name].unparse()
