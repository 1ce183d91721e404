import os

import pytest

from lazyattn.data import sources
from lazyattn.data.corpus import Document
from lazyattn.errors import InputError


def _write(folder, **texts):
    for name, text in texts.items():
        path = folder / (name.replace("__", "/") + ".txt")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())


def test_a_folder_gives_its_text_files_unchanged_in_order(tmp_path):
    _write(tmp_path, b="two\r\n\u4f60 ", a__x="one", blank=" \n")
    (tmp_path / "c.md").write_text("not text")
    assert list(sources.documents(str(tmp_path))) == [
        Document("a/x.txt", "one"),
        Document("b.txt", "two\r\n\u4f60 "),
    ]


def test_stdlib_is_the_embedded_corpus():
    assert next(sources.documents("stdlib")).id.startswith("topics/")


def test_identity_follows_names_and_content(tmp_path):
    _write(tmp_path, a="one", b="two")
    seen = [sources.identity(str(tmp_path))]
    os.utime(tmp_path / "a.txt", (0, 0))
    assert sources.identity(str(tmp_path)) == seen[0]
    _write(tmp_path, b="tow")
    seen.append(sources.identity(str(tmp_path)))
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    seen.append(sources.identity(str(tmp_path)))
    seen.append(sources.identity("stdlib"))
    assert len({str(identity) for identity in seen}) == 4


@pytest.mark.parametrize("read", [sources.identity, lambda source: list(sources.documents(source))])
class TestErrors:
    @pytest.mark.parametrize("name", ["wikipedia", "", "/no/such/folder"])
    def test_unknown_or_missing(self, read, name):
        message = rf"^data\.source is '{name}', but it must be 'stdlib' or an existing folder"
        with pytest.raises(InputError, match=message):
            read(name)

    def test_a_file(self, read, tmp_path):
        _write(tmp_path, a="one")
        with pytest.raises(InputError, match="must be 'stdlib' or an existing folder"):
            read(str(tmp_path / "a.txt"))

    def test_empty_folder(self, read, tmp_path):
        with pytest.raises(InputError, match=r"that folder holds no \.txt file"):
            read(str(tmp_path))

    def test_unreadable(self, read, tmp_path, monkeypatch):
        _write(tmp_path, a="one")

        def refuse(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
        with pytest.raises(
            InputError, match=r"a\.txt', which cannot be read \(Permission denied\)"
        ):
            read(str(tmp_path))


def test_files_of_white_space(tmp_path):
    _write(tmp_path, a=" \n")
    with pytest.raises(InputError, match=r"its \.txt files hold no text"):
        list(sources.documents(str(tmp_path)))


def test_invalid_utf8_names_file_and_place(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(InputError, match=r"a\.txt', which is not UTF-8 at byte 2"):
        list(sources.documents(str(tmp_path)))
