"""A dataset that is really built, and read back, without TensorFlow."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")

from lazyattn.data import fineweb_edu, manifest
from lazyattn.data.corpus import is_validation
from lazyattn.data.fineweb_edu import FIELDS, build, open_dataset, shard_documents
from lazyattn.data.prepare.run import Preparation, prepare_shards
from lazyattn.data.prepare.selection import Selection
from lazyattn.data.shards import Shards
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from tests.data.prepare.corpora import make_documents, write_parquet

DOCUMENTS = make_documents(3000, words=20)
KEPT = [document for document in DOCUMENTS if document["int_score"] >= 3]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parquet")
    for part in range(3):
        documents = DOCUMENTS[1000 * part : 1000 * (part + 1)]
        write_parquet(folder / f"{part}.parquet", documents, row_group_size=300)
    return folder


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    return build(folder, source=source, min_int_score=3, validation_fraction=0.1)


def test_every_field_of_every_document_comes_back(built):
    for split, held_out in (("train", False), ("validation", True)):
        expected = [d for d in KEPT if is_validation(d["id"], 0.1) == held_out]
        found = built.as_data_source(split)
        assert len(found) == len(expected) > 100
        for document, original in zip(found, expected, strict=True):
            assert set(document) == set(FIELDS)
            for field, value in original.items():
                stored = document[field]
                if isinstance(value, str):
                    assert stored.decode() == value
                else:  # floats are stored in single precision
                    assert stored == (np.float32(value) if type(value) is float else value)


def test_without_tensorflow(built):
    if importlib.util.find_spec("tensorflow") is not None:
        pytest.skip("TensorFlow is installed here")
    program = (
        "import sys, tensorflow_datasets as tfds, lazyattn.data.fineweb_edu;"
        "s = tfds.data_source('fineweb_edu/local', data_dir=sys.argv[1], split='validation');"
        "print(len(s), s[3]['id'].decode())"
    )
    folder = built.data_path.parent.parent.parent
    command = [sys.executable, "-c", program, str(folder)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    expected = [d["id"] for d in KEPT if is_validation(d["id"], 0.1)]
    assert out.split() == [str(len(expected)), expected[3]]


def test_prepared_from_it_or_from_parquet(built, source, tmp_path):
    """The same documents in the same split, whichever way they came."""
    Tokenizer.train([KEPT[0]["text"]], 280).save(tmp_path / "tokenizer.json")
    texts = {}
    for name, given in (("tfds", built.data_path), ("parquet", source)):
        done = prepare_shards(
            Preparation(
                inputs=(str(given),),
                output=str(tmp_path / name),
                tokenizer=str(tmp_path / "tokenizer.json"),
                selection=Selection(min_int_score=3, validation_fraction=0.1),
                num_workers=1,
            )
        )
        assert sum(split.documents for split in done.manifest.splits.values()) == len(KEPT)
        texts[name] = [
            [ids.tolist() for ids in Shards(tmp_path / name, split)] for split in manifest.SPLITS
        ]
    assert texts["tfds"] == texts["parquet"]


def test_it_is_built_once(built, source, monkeypatch):
    monkeypatch.setattr(fineweb_edu, "_documents", None)
    folder = built.data_path.parent.parent.parent
    again = build(folder, source=source, min_int_score=3, validation_fraction=0.1)
    assert len(again.as_data_source("train")) == len(built.as_data_source("train"))
    with pytest.raises(InputError, match="was built with min_int_score = 3 and not None"):
        build(folder, source=source, validation_fraction=0.1)


def test_which_documents_a_file_holds(built):
    assert open_dataset(built.data_path).info.splits["train"].num_examples > 1000
    for file in built.data_path.glob("*.array_record*"):
        split, start, stop = shard_documents(file)
        assert split in file.name
        assert (start, stop) == (0, built.info.splits[split].num_examples)
    with pytest.raises(InputError, match="is no file of the dataset in its folder"):
        shard_documents(built.data_path / "x.array_record")
    with pytest.raises(InputError, match="is no folder of a built TensorFlow dataset"):
        open_dataset(built.data_path.parent)


def test_faults_are_told_or_fatal(tmp_path, caplog):
    documents = make_documents(40)
    documents[0]["text"] = None
    documents[1]["url"] = None
    path = write_parquet(tmp_path / "in" / "a.parquet", documents)
    (tmp_path / "in" / "b.parquet").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"a\.parquet, row 0: missing_text; on_fault='skip'"):
        build(tmp_path / "fatal", source=tmp_path / "in", on_fault="fail")
    built = build(tmp_path / "out", source=tmp_path / "in", validation_fraction=0.2)
    told = [record.message for record in caplog.records if record.message.startswith("skipped")]
    assert len(told) == 2  # of each fault once, not once a split
    assert "a.parquet, row 0: missing_text" in told[0]
    assert "b.parquet: a part can't be read (" in told[1]
    train = built.as_data_source("train")
    assert len(train) + len(built.as_data_source("validation")) == 39
    assert built.info.metadata["skipped"] == {"missing_text": 1, "unreadable": 0}
    nothing = [d["url"] for d in train if d["id"].decode() == documents[1]["id"]]
    assert nothing in ([b""], [])


@pytest.mark.parametrize("size", ["10BT", "100BT"])
def test_samples_are_downloaded(size, source, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository, **settings):
        asked.append((repository, settings))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(fineweb_edu, "_documents", _few)
    built = build(tmp_path, f"sample_{size.lower()}", validation_fraction=0.1)
    assert built.data_path.parent.name == f"sample_{size.lower()}"
    settings = {"repo_type": "dataset", "allow_patterns": [f"sample/{size}/*.parquet"]}
    assert asked == [("HuggingFaceFW/fineweb-edu", settings)]


def _few(file):
    for place, document in enumerate(DOCUMENTS[:20]):
        yield place, {k: v.encode() if isinstance(v, str) else v for k, v in document.items()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": "sample_1bt"}, "config is 'sample_1bt', but it must be one of sample_10bt, "),
        ({}, "source is None, but it must be a folder of Parquet files"),
        ({"source": "."}, "source is '.', but it must be a folder that holds Parquet files"),
        ({"on_fault": "cry"}, "on_fault is 'cry', but it must be 'skip' or 'fail'"),
        ({"validation_fraction": 1}, "validation_fraction is 1, but it must be at least 0"),
    ],
    ids=str,
)
def test_bad_settings(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        build(tmp_path / "out", **settings)


def test_an_empty_split_and_another_schema(tmp_path):
    documents = make_documents(30)
    write_parquet(tmp_path / "in" / "a.parquet", documents)
    with pytest.raises(InputError, match="can't be built: a split has no document"):
        build(tmp_path / "out", source=tmp_path / "in", validation_fraction=0)
    for document in documents:
        del document["dump"]
    write_parquet(tmp_path / "in" / "a.parquet", documents)
    with pytest.raises(InputError, match=r"a.parquet is not in FineWeb-Edu's schema: it has no du"):
        build(tmp_path / "out", source=tmp_path / "in")
