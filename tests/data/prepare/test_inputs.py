import os
import shutil

import pytest

from lazyattn.data.prepare import inputs
from lazyattn.data.prepare.inputs import make_plan
from lazyattn.data.prepare.readers import read_unit
from lazyattn.data.prepare.selection import Selection
from lazyattn.errors import InputError
from tests.data.prepare.corpora import make_documents, write_jsonl, write_parquet

SELECTION = Selection()


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    write_parquet(folder / "a.parquet", make_documents(300, 1), row_group_size=20)
    write_parquet(folder / "b" / "c.parquet", make_documents(200, 2), row_group_size=200)
    write_jsonl(folder / "d.jsonl", make_documents(100, 3))
    write_jsonl(folder / "e.jsonl.zst", make_documents(100, 4))
    write_jsonl(folder / "f.jsonl.gz", make_documents(100, 5))
    (folder / "README.md").write_text("no data")
    return folder


@pytest.mark.parametrize("smallest", [1, 700, 3000, 10**9])
def test_every_document_is_in_one_unit(corpus, smallest, monkeypatch):
    monkeypatch.setattr(inputs, "_SMALLEST", smallest)
    plan = make_plan([str(corpus)], SELECTION, smallest)
    assert [unit.index for unit in plan.units] == list(range(len(plan.units)))
    found = [row.id for unit in plan.units for row in read_unit(unit, SELECTION)]
    found = [id.decode() if isinstance(id, bytes) else id for id in found]
    numbers = {1: 300, 2: 200, 3: 100, 4: 100, 5: 100}
    assert found == [f"<urn:uuid:{s}-{i}>" for s, n in numbers.items() for i in range(n)]
    assert [file.file for file in plan.files] == [
        "a.parquet",
        "b/c.parquet",
        "d.jsonl",
        "e.jsonl.zst",
        "f.jsonl.gz",
    ]
    if smallest == 3000:
        cut = {kind: [u for u in plan.units if u.kind == kind] for kind in inputs.KINDS}
        assert all(len(cut[kind]) == 1 for kind in ("jsonl.zst", "jsonl.gz"))  # can't be cut
        assert all(unit.weight <= 3600 for unit in cut["jsonl"] + cut["parquet"])
        assert len(cut["parquet"]) > 10


def test_files_named_twice_are_read_once(corpus):
    names = [str(corpus), f"{corpus}/*.parquet", f"{corpus}/**/*.parquet", f"{corpus}/a.parquet"]
    assert make_plan(names, SELECTION, 10**6) == make_plan(names[:1], SELECTION, 10**6)
    (corpus / "again.parquet").symlink_to(corpus / "a.parquet")
    assert len(make_plan(names, SELECTION, 10**6).files) == 5


@pytest.fixture
def hub(corpus, tmp_path):
    """The corpus as the Hugging Face hub's tools store a download: links to blobs."""
    folder = tmp_path / "datasets--owner--name"
    snapshot, blobs = folder / "snapshots" / "5c9d", folder / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(corpus.rglob("*"))):
        if path.is_file():
            blob = blobs / f"{number:064x}"
            blob.write_bytes(path.read_bytes())
            link = snapshot / path.relative_to(corpus)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


@pytest.mark.parametrize(
    "given",
    [
        "{hub}",
        "{hub}/snapshots/5c9d",
        "{hub}/snapshots/*",
        "{hub}/**/*.parquet,{hub}/snapshots/5c9d/*.jsonl*",
        "{hub}/snapshots/5c9d/a.parquet,{hub}/snapshots/5c9d/b,{hub}/snapshots/*/*.jsonl*",
    ],
)
def test_links_to_blobs_are_read_by_their_own_names(corpus, hub, given):
    plan = make_plan(given.format(hub=hub).split(","), SELECTION, 10**6)
    plain = make_plan([str(corpus)], SELECTION, 10**6)
    assert [file.file for file in plan.files] == [file.file for file in plain.files]
    assert [unit.kind for unit in plan.units] == [unit.kind for unit in plain.units]

    def rows(which):
        return [row for unit in which.units for row in read_unit(unit, SELECTION)]

    assert rows(plan) == rows(plain)


def test_a_blob_of_two_revisions_is_read_once(hub):
    shutil.copytree(hub / "snapshots" / "5c9d", hub / "snapshots" / "77aa", symlinks=True)
    plan = make_plan([str(hub)], SELECTION, 10**6)
    assert len(plan.files) == 5 and all(file.file[:1] in "abdef" for file in plan.files)


def test_a_link_to_nothing_is_refused(hub):
    (hub / "snapshots" / "5c9d" / "a.parquet").resolve().unlink()
    for given in (f"{hub}", f"{hub}/snapshots/*/*.parquet", f"{hub}/snapshots/5c9d/a.parquet"):
        with pytest.raises(InputError, match=r"--input has '.*a.parquet', a link to '.*1', which"):
            make_plan([given], SELECTION, 10**6)


def test_links_to_folders_are_followed_each_once(corpus, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "first").symlink_to(corpus)
    (linked / "second").symlink_to(corpus)
    (corpus / "b" / "round").symlink_to(linked)
    plan = make_plan([str(linked)], SELECTION, 10**6)
    assert plan.files == make_plan([str(corpus)], SELECTION, 10**6).files


@pytest.mark.parametrize("name", ["README.md", "nothing", "*.txt", "empty"])
def test_nothing_to_read(corpus, name):
    (corpus / "empty").mkdir()
    with pytest.raises(InputError, match=r"--input is '.*', but it must be folders, files or"):
        make_plan([str(corpus / name)], SELECTION, 10**6)


def test_a_truncated_file_is_planned_without(corpus):
    path = corpus / "a.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    plan = make_plan([str(corpus)], SELECTION, 10**6)
    assert "Parquet" in plan.files[0].error
    assert all(file.error is None for file in plan.files[1:])
    assert all(unit.path != str(path) for unit in plan.units)
    with pytest.raises(InputError, match=r"No file of --input can be read: .*a\.parquet: "):
        make_plan([str(path)], SELECTION, 10**6)


def test_a_missing_column(corpus):
    with pytest.raises(InputError, match=r"--text_field is 'content', but .*a.parquet has no such"):
        make_plan([str(corpus)], Selection(text_field="content"), 10**6)
