"""Files as people have them: line ends of all kinds, byte-order marks, bytes that are no text."""

import json

import pytest

from lazyattn.data.documents import read_texts
from lazyattn.data.sources import documents, identity
from lazyattn.data.text_files import check_unicode, json_lines, json_objects, read_text
from lazyattn.errors import InputError
from lazyattn.eval.lambada import read_lambada

MARK = b"\xef\xbb\xbf"
# What str.splitlines takes for line ends, and a JSON string may hold as it is.
INSIDE = "one\u2028two\u2029three\u0085four \u2028five"


def _write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \r\n"])
@pytest.mark.parametrize("mark", [b"", MARK])
def test_only_a_newline_ends_a_line(tmp_path, end, mark):
    texts = [INSIDE, "a b"]
    lines = end.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path = _write(tmp_path / "a.jsonl", mark + lines.encode() + end.encode())
    assert [text for _, text in json_lines(path, "x", ("text",))] == texts
    assert [text.text for text in read_texts(str(path))] == texts
    assert read_lambada(str(path)) == texts


def test_joined_files_have_marks_in_the_middle(tmp_path):
    line = MARK + b'{"text": "x"}\n'
    path = _write(tmp_path / "a.jsonl", line * 2 + MARK)
    assert len(list(json_lines(path, "x", ("text",)))) == 2


@pytest.mark.parametrize("read", [lambda path: read_text(path, "x"), lambda p: _read_all(p)])
def test_a_text_file_is_what_its_bytes_say(tmp_path, read):
    path = _write(tmp_path / "a.txt", MARK + b"a\r\nb\xe2\x80\xa8c\n")
    assert read(path) == "a\r\nb\u2028c\n"


def _read_all(path):
    (text,) = read_texts(str(path))
    assert text.bytes == len(text.text.encode())
    (document,) = documents(str(path.parent))
    assert document.text == text.text
    return text.text


def test_a_mark_makes_no_other_source(tmp_path):
    found = []
    for name, mark in (("a", b""), ("b", MARK)):
        (tmp_path / name).mkdir()
        _write(tmp_path / name / "x.txt", mark + b"text")
        found.append((identity(str(tmp_path / name)), list(documents(str(tmp_path / name)))))
    assert found[0] == found[1]


def test_the_first_field_that_is_a_string_counts(tmp_path):
    path = _write(tmp_path / "a.jsonl", b'{"page": null, "text": "x"}\n{"page": "p", "text": "y"}')
    assert list(json_lines(path, "x", ("page", "text"))) == [("text", "x"), ("page", "p")]
    assert [text.text for text in read_texts(str(path))] == ["x", "p"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "\xff"}', "whose line 2 is not UTF-8 at its byte 10."),
        (MARK + b'{"text": "\xed\xa0\x80"}', "whose line 1 is not UTF-8 at its byte 13."),
        (
            b'{"text": "ab\\ud800c"}',
            "whose line 1 has a text that is not valid Unicode: character 2 is half of a surrogate"
            " pair (U+D800).",
        ),
        ('{"text": "a"}'.encode("utf-16"), "whose line 1 is not UTF-8 at its byte 0."),
        (b'{"text": "a"\n', "whose line 1 is no JSON object with a string text."),
        (b"[" * 100_000, "whose line 1 is no JSON object with a string text."),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    path = _write(tmp_path / "a.jsonl", content)
    with pytest.raises(InputError) as error:
        list(json_lines(path, "--text", ("text",)))
    assert str(error.value) == f"--text is {str(path)!r}, {message}"
    with pytest.raises(InputError, match=r"^--lambada is '.*a.jsonl', whose line"):
        read_lambada(str(path))


def test_objects_of_any_kind(tmp_path):
    path = _write(tmp_path / "a.jsonl", MARK + b'{"a": 1}\n\n{"b": [2]}\n')
    assert [item for _, item in json_objects(path, "x")] == [{"a": 1}, {"b": [2]}]
    with pytest.raises(InputError, match=r"whose line 2 is no JSON object\.$"):
        list(json_objects(_write(path, b"{}\n3"), "x"))


def test_a_folder_s_bad_file_is_named_with_the_flag(tmp_path):
    _write(tmp_path / "a.txt", MARK + b"ab\xff")
    with pytest.raises(InputError, match=r"A file of --text is '.*a.txt', .* not UTF-8 at byte 5"):
        read_texts(str(tmp_path))
    with pytest.raises(InputError, match=r"A file of data.source is '.*a.txt', which is not UTF-8"):
        list(documents(str(tmp_path)))


def test_a_byte_of_the_command_line_is_told_as_one():
    text = b"caf\xe9".decode(errors="surrogateescape")
    with pytest.raises(InputError) as error:
        check_unicode(text, f"--prompt is {text!r}, which")
    assert str(error.value) == (
        "--prompt is 'caf\\udce9', which is not valid Unicode: character 3 is half of a surrogate"
        " pair (U+DCE9, which was byte 0xe9)."
    )
