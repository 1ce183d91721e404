import itertools
import zipfile

import numpy as np
import pytest

from lazyattn.data import corpus
from lazyattn.data.corpus import is_validation, stdlib_documents
from lazyattn.errors import InputError

LONG = "This sentence is here to make the docstring of a module long enough to keep. " * 4

ABC = f'''"""First, the module.

    {LONG}
    """

if True:
    class Thing:
        """Second, a class and what it is good for."""

        async def method(self):
            """Third, a method that does something."""
            def inner():
                """Fourth, what lies within the method."""

        def short(self):
            """Short."""

def last():
    """Fifth, the last function of the module."""

def again():
    """Third, a method that does something."""
'''


@pytest.fixture
def no_topics(monkeypatch):
    monkeypatch.setattr(corpus, "_topics", dict)


def _texts(*path):
    return {d.id: d.text for d in stdlib_documents([str(p) for p in path])}


def test_docstrings_come_once_cleaned_and_in_source_order(tmp_path, no_topics):
    (tmp_path / "abc.py").write_text(ABC)
    text = _texts(tmp_path)["modules/abc"]
    paragraphs = text.split("\n\n")
    assert [p.split(",")[0] for p in paragraphs if "," in p] == (
        ["First", "Second", "Third", "Fourth", "Fifth"]
    )
    assert paragraphs[1].startswith("This sentence")  # indentation is gone
    assert "Short." not in text


def test_modules_are_found_in_packages_and_zips_sorted_and_never_imported(tmp_path, no_topics):
    package = tmp_path / "lib" / "email"
    package.mkdir(parents=True)
    body = "\nraise SystemExit('imported')\n"
    (package / "__init__.py").write_text(f'"""Package. {LONG}"""{body}')
    (package / "policy.py").write_text(f'"""Policy. {LONG}"""{body}')
    (package / "tests").mkdir()
    (package / "tests" / "__init__.py").write_text(f'"""Tests. {LONG}"""')
    (tmp_path / "lib" / "no_such_module.py").write_text(f'"""Not standard. {LONG}"""')
    with zipfile.ZipFile(tmp_path / "python.zip", "w") as archive:
        archive.writestr("json/__init__.py", f'"""Zipped. {LONG}"""{body}')
        archive.writestr("json/tool.py", f'"""Tool. {LONG}"""{body}')
    ids = list(_texts(tmp_path / "python.zip", tmp_path / "lib"))
    assert ids == [
        "modules/email",
        "modules/email.policy",
        "modules/json",
        "modules/json.tool",
    ]


def test_what_cannot_be_read_is_skipped(tmp_path, no_topics):
    (tmp_path / "abc.py").write_text(f'"""Good. {LONG}"""')
    (tmp_path / "ast.py").write_text(f'"""Bad syntax. {LONG}"""\nprint "x"\n')
    (tmp_path / "bz2.py").write_bytes(b'# -*- coding: no-such -*-\n"""Bad coding."""\n')
    (tmp_path / "cgi.py").write_bytes(b'"""Bad \xff byte."""\n')
    (tmp_path / "cmd.py").write_text(f'"""Surrogate \\ud800. {LONG}"""')
    (tmp_path / "csv.pyc").write_bytes(b"compiled only")
    (tmp_path / "dis.py").write_text(f'"""Invalid escape \\( only warns. {LONG}"""')
    assert list(_texts(tmp_path)) == ["modules/abc", "modules/dis"]


def test_a_docstring_of_two_modules_is_kept_once(tmp_path, no_topics):
    (tmp_path / "abc.py").write_text(f'"""{LONG}"""')
    (tmp_path / "ast.py").write_text(f'"""{LONG}"""')
    assert list(_texts(tmp_path)) == ["modules/abc"]


def test_topics_of_the_same_text_are_kept_once(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_topics", lambda: {"b": LONG, "a": LONG, "c": "short"})
    assert list(_texts(tmp_path)) == ["topics/a"]


def test_no_text_at_all_is_an_error(tmp_path, no_topics):
    with pytest.raises(InputError, match=r"^data\.source is 'stdlib', but this Python carries"):
        list(stdlib_documents([str(tmp_path)]))


def test_the_real_corpus_begins_with_english():
    first = list(itertools.islice(stdlib_documents(), 90))
    again = list(itertools.islice(stdlib_documents(), 90))
    assert first == again
    assert len({d.id for d in first}) == 90
    text = "\n".join(d.text for d in first)
    assert len(text) > 300_000
    words = text.lower().split()
    assert sum(word in {"the", "of", "a", "is", "to"} for word in words) > 0.1 * len(words)


def test_held_out_documents_are_a_stable_share():
    ids = [f"document {i}" for i in range(4000)]
    few = {i for i in ids if is_validation(i, 0.05)}
    more = {i for i in ids if is_validation(i, 0.2)}
    assert few < more
    np.testing.assert_allclose([len(few) / 4000, len(more) / 4000], [0.05, 0.2], atol=0.02)
    # From SHA-256 alone: the same in every process and version.
    assert [i for i in ids[:30] if is_validation(i, 0.05)] == ["document 21", "document 22"]
