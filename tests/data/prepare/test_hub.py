"""Datasets of the Hugging Face hub as a stream.

No hub can be reached where tests run. A folder of Parquet files stands in for it, read by
the package `datasets` where it is installed, and by a fake with the same interface in
any case.
"""

import sys
import types

import pyarrow.parquet as pq
import pytest

from lazyattn import command_line
from lazyattn.data import manifest
from lazyattn.data.corpus import is_validation
from lazyattn.data.prepare import __main__ as command
from lazyattn.data.prepare import hub, readers, unit
from lazyattn.data.prepare.run import Preparation, prepare_shards
from lazyattn.data.prepare.selection import Selection
from lazyattn.data.shards import Shards
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from tests.data.prepare.corpora import make_documents, write_jsonl, write_parquet

URL = "hf://datasets/owner/name"
PARTS = [make_documents(40, 1), make_documents(30, 2), make_documents(20, 3)]
HELD_OUT = make_documents(15, 4)


class _Stream:
    """What is used of `datasets.IterableDataset`; every file is a shard."""

    info = types.SimpleNamespace(splits=None)

    def __init__(self, files, columns=None):
        self._files, self._columns = files, columns

    @property
    def num_shards(self):
        return len(self._files)

    @property
    def column_names(self):
        return self._columns

    def select_columns(self, columns):
        return _Stream(self._files, columns)

    def shard(self, num_shards, index):
        assert num_shards == len(self._files)
        return _Stream([self._files[index]], self._columns)

    def __iter__(self):
        for file in self._files:
            yield from pq.read_table(file, columns=self._columns).to_pylist()


def _fake_load(path, name=None, *, split, data_files, revision, streaming):
    del revision
    assert streaming
    if name not in (None, "default"):
        raise ValueError(f"BuilderConfig {name!r} not found. Available: ['default']")
    pattern = data_files[split] if data_files else f"data/{split}-*.parquet"
    files = sorted(path.glob(pattern))
    if not files:
        raise ValueError(f"Bad split: {split}. Available splits: ['train', 'validation']")
    return _Stream(files)


@pytest.fixture(params=["fake", "installed"])
def hub_folder(request, tmp_path, monkeypatch):
    """The folder of a dataset "owner/name", which the package finds under that name."""
    folder = tmp_path / "hub" / "name"
    for number, part in enumerate(PARTS):
        write_parquet(folder / "data" / f"train-{number:05}-of-00003.parquet", part)
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", HELD_OUT)
    if request.param == "fake":
        monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))
        load = _fake_load
    else:
        load = pytest.importorskip("datasets").load_dataset
    package = sys.modules["datasets"]

    def load_dataset(path, *args, revision, **kwargs):
        assert (path, revision) == ("owner/name", "c0ffee")
        where = folder if load is _fake_load else str(folder)
        return load(where, *args, revision=None, **kwargs)

    monkeypatch.setattr(package, "load_dataset", load_dataset, raising=False)
    monkeypatch.setattr(hub, "_commit", lambda dataset: "c0ffee")
    hub._opened.cache_clear()
    yield folder
    hub._opened.cache_clear()


def _preparation(output, **changes):
    settings = {
        "inputs": (URL,),
        "output": str(output),
        "tokenizer": "train",
        "vocab_size": 300,
        "selection": Selection(validation_fraction=0.2),
        "num_workers": 1,
    }
    return Preparation(**(settings | changes))


def _texts(folder, split):
    tokenizer = Tokenizer.load(folder)
    return [tokenizer.decode(ids) for ids in Shards(folder, split)]


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _of(split, documents):
    return [d["text"] for d in documents if is_validation(d["id"], 0.2) == (split != "train")]


def test_each_row_once_in_its_split_and_a_shard_for_each_file(hub_folder, tmp_path):
    folder = prepare_shards(_preparation(tmp_path / "out")).folder
    for split in ("train", "validation"):
        assert _texts(folder, split) == _of(split, [d for part in PARTS for d in part])
    content = manifest.verify(folder, deep=True)
    assert len(content.splits["train"].shards) == 3
    (source,) = content.sources
    assert source.file == f"{URL}@c0ffee (train, 3 files)" and source.documents == 90
    assert prepare_shards(_preparation(tmp_path / "out")).finished_before


def test_an_interrupted_run_reads_no_finished_file_again(hub_folder, tmp_path, monkeypatch):
    whole = prepare_shards(_preparation(tmp_path / "whole")).folder
    calls = []

    def dies(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write_whole(*args)

    write_whole = unit.write_whole
    with monkeypatch.context() as patch:
        patch.setattr(unit, "write_whole", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare_shards(_preparation(tmp_path / "out"))
    read = []

    def spied(dataset, index, fields):
        read.append(index)
        return hub.hub_rows(dataset, index, fields)

    monkeypatch.setattr(readers, "hub_rows", spied)
    assert _files(prepare_shards(_preparation(tmp_path / "out")).folder) == _files(whole)
    assert read == [2]


def test_a_stream_that_breaks_goes_on_at_its_file(hub_folder, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", PARTS[0])
    given = Tokenizer.train([d["text"] for d in PARTS[0]], 300)
    given.save(tmp_path / "tokenizer.json")
    preparation = _preparation(tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"))
    real = hub._opened(hub.HubDataset("owner/name", "c0ffee"))

    class Broken:
        """Loses the connection in the second file."""

        num_shards, column_names, info = 3, None, real.info

        def __iter__(self):
            return iter(real)

        def select_columns(self, columns):
            return self

        def shard(self, num_shards, index):
            for number, row in enumerate(real.shard(num_shards=num_shards, index=index)):
                if (index, number) == (1, 7):
                    raise ConnectionError("reset by\npeer")
                yield row

    with monkeypatch.context() as patch:
        patch.setattr(hub, "_opened", lambda dataset: Broken())
        told = r"broke at row 7 of file 1 \(reset by peer\); the same command goes on after the fil"
        with pytest.raises(InputError, match=told):
            prepare_shards(preparation)
    assert (tmp_path / "out" / ".preparation" / "unit-00000.json").exists()
    folder = prepare_shards(preparation).folder
    assert _texts(folder, "train") == _of("train", [d for part in PARTS for d in part])


def test_splits_files_and_documents_of_ones_own(hub_folder, tmp_path):
    write_jsonl(tmp_path / "own.jsonl", PARTS[1])
    preparation = _preparation(
        tmp_path / "out",
        inputs=(f"{URL}@main/data/train-00000-*.parquet", str(tmp_path / "own.jsonl")),
        validation_inputs=(URL,),
        hub_config="default",
        hub_validation_split="validation",
    )
    folder = prepare_shards(preparation).folder
    assert _texts(folder, "validation") == [d["text"] for d in HELD_OUT]
    # Files of one's own come first.
    assert _texts(folder, "train") == [d["text"] for part in (PARTS[1], PARTS[0]) for d in part]
    with pytest.raises(InputError, match=r"whose split 'train' --input has, too; --hub_validation"):
        prepare_shards(
            _preparation(
                tmp_path / "x", validation_inputs=(f"{URL}@main",), hub_validation_split="train"
            )
        )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hub_split": "gone"}, rf"^{URL}@c0ffee can't be read .*split 'gone': .*Bad split: gone"),
        ({"hub_config": "de"}, r"can't be read .*--hub_config=de, split 'train': .*default"),
        (
            {"selection": Selection(text_field="body")},
            rf"^--text_field is 'body', but {URL}@c0ffee has no such column, only .*text",
        ),
        ({"inputs": ("hf://models/a/b",)}, r"^--input is 'hf://models/a/b', but it must be hf://"),
        ({"inputs": ("hf://datasets/b",)}, r"must be hf://datasets/OWNER/NAME, and after it perh"),
    ],
)
def test_what_cannot_be_read(hub_folder, tmp_path, changes, told):
    with pytest.raises(InputError, match=told):
        prepare_shards(_preparation(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_another_commit_is_other_data(hub_folder, tmp_path, monkeypatch):
    prepare_shards(_preparation(tmp_path / "out"))
    pinned = hub.pinned

    def moved(dataset):
        found, columns, weight = pinned(dataset)
        return hub.HubDataset(found.name, "decaf", split="train", files=3), columns, weight

    monkeypatch.setattr(hub, "pinned", moved)
    with pytest.raises(InputError, match=rf"changed since; .*, or name .*, as in {URL}@c0ffee \("):
        prepare_shards(_preparation(tmp_path / "out"))


def test_the_hub_cannot_be_reached(hub_folder, tmp_path, monkeypatch):
    def unreachable(dataset):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(hub, "_commit", unreachable)
    with pytest.raises(
        InputError, match=r"can't be read from the Hugging Face hub .*: Name or ser"
    ):
        prepare_shards(_preparation(tmp_path / "out"))


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        InputError, match=r"needs the package datasets \(.*\); `pip install dataset"
    ):
        prepare_shards(_preparation(tmp_path / "out"))


def test_a_folder_of_that_name_is_in_the_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(InputError, match=r"but there is 'owner/name' in the current folder, which"):
        prepare_shards(_preparation("out"))


def test_settings_of_the_hub_without_it(tmp_path):
    for name in ("hub_config", "hub_split"):
        with pytest.raises(InputError, match=rf"^--{name} is 'x', but --input has no dataset of"):
            _preparation(tmp_path, inputs=("a.jsonl",), **{name: "x"})
    with pytest.raises(InputError, match=r"but --validation_input has no dataset of the Hugging"):
        _preparation(tmp_path, hub_validation_split="x")


def test_the_flag_takes_a_dataset_among_files():
    values = command.FLAGS
    command_line.parse(["program", f"--input=a.jsonl,{URL}@v1.0/data/*.parquet"], values)
    assert values["input"].value == ["a.jsonl", f"{URL}@v1.0/data/*.parquet"]
    values["input"].unparse()


def test_parts_of_a_url():
    found = hub.parse("--input", f"{URL}@refs%2Fconvert%2Fparquet/de/*.parquet", "de", "test")
    assert found == hub.HubDataset(
        "owner/name", "refs/convert/parquet", "de/*.parquet", "de", "test"
    )
    assert found.label.endswith(" (de, test, 0 files)")
