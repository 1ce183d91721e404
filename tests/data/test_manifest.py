import json

import pytest

from lazyattn.data import manifest
from lazyattn.errors import InputError
from tests.data.test_shards import documents, write_folder

TRAIN = "train-00001-of-00002.arrayrecord"


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data", [documents(9), documents(8, 1)], [documents(3, 2)])


def test_it_comes_back(folder):
    content = manifest.verify(folder, deep=True)
    assert manifest.Manifest.from_json(content.to_json()) == content
    train = content.splits["train"]
    assert train.documents == 17
    assert train.tokens == sum(map(len, [*documents(9), *documents(8, 1)]))
    assert train.bytes == 3 * train.tokens
    written = json.loads((folder / "manifest.json").read_text())
    assert written["schema_version"] == manifest.SCHEMA_VERSION
    assert written["splits"]["train"]["tokens"] == train.tokens
    assert written["text"]["documents"] == 20
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def _edit(folder, change):
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def _newer(content):
    content["schema_version"] = 2


def _more_tokens(content):
    content["splits"]["train"]["tokens"] += 1


def _no_split(content):
    del content["splits"]["validation"]


def _no_dtype(content):
    content["token_dtype"] = "int64"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_newer, "has schema_version 2, but this version reads 1; prepare the data again"),
        (_more_tokens, r"is damaged \(the totals of train don't add up\)"),
        (_no_split, r"is damaged \('validation'\)"),
        (_no_dtype, r"is damaged \(token_dtype is 'int64'\)"),
        (dict.clear, "is damaged; prepare"),
    ],
)
def test_a_manifest_that_was_tampered_with(folder, change, message):
    _edit(folder, change)
    with pytest.raises(InputError, match=message):
        manifest.verify(folder)


@pytest.mark.parametrize("text", ["", "[]", "\xff", '{"schema_version": 1}'])
def test_what_is_no_manifest(folder, text):
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"manifest.json' (is damaged|cannot be read)"):
        manifest.verify(folder)


def test_no_manifest(tmp_path):
    with pytest.raises(InputError, match="is no folder of tokenised shards: it has no manifest"):
        manifest.verify(tmp_path / "nothing")


def test_a_missing_shard(folder):
    (folder / TRAIN).unlink()
    with pytest.raises(InputError, match="named by the manifest, but cannot be read"):
        manifest.verify(folder)


def test_a_longer_shard(folder):
    with (folder / TRAIN).open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=rf"{TRAIN}' is not the file its manifest describes: it"):
        manifest.verify(folder)


def test_a_flipped_bit_is_found_by_reading_all(folder):
    content = bytearray((folder / TRAIN).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / TRAIN).write_bytes(content)
    manifest.verify(folder)
    with pytest.raises(InputError, match="its SHA-256 is another"):
        manifest.verify(folder, deep=True)


def test_another_tokenizer_in_its_place(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json' is not the file its manifest describ"):
        manifest.verify(folder)


def test_tokens_of_two_tokenizers_do_not_mix(folder, tmp_path):
    other = write_folder(tmp_path / "other", [documents(2)], [documents(1)], tokenizer=b"other")
    folders = [str(folder), str(folder), str(other)]
    manifests = [manifest.verify(path) for path in folders]
    manifest.require_same_tokenizer(folders[:2], manifests[:2])
    with pytest.raises(InputError, match=r"data' and '.*other' were made with different tokeniz"):
        manifest.require_same_tokenizer(folders, manifests)
    assert manifests[0].fingerprint != manifests[2].fingerprint
