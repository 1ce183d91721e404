import hashlib

import pytest

from lazyattn.data.corpus import is_validation
from lazyattn.data.prepare.selection import Selected, Selection, require_fields, select
from lazyattn.errors import InputError

SCORED = Selection(min_int_score=3, validation_fraction=0.5)


@pytest.mark.parametrize(
    ("text", "id", "score", "reason"),
    [
        ("a", "1", 2, "low_score"),
        ("a", "1", 2.99, "low_score"),
        ("a", "1", None, "missing_score"),
        ("a", "1", "4", "missing_score"),
        ("a", "1", float("nan"), "missing_score"),
        ("a", "1", True, "missing_score"),
        (None, "1", 3, "missing_text"),
        (["a"], "1", 3, "missing_text"),
        (7, "1", 3, "missing_text"),
        ("", "1", 3, "empty_text"),
        (b" \n\t", "1", 3, "empty_text"),
        ("a", None, 3, "missing_id"),
        ("a", "", 3, "missing_id"),
        ("a", 1.5, 3, "missing_id"),
        ("a", True, 3, "missing_id"),
        (b"caf\xe9", "1", 3, "invalid_unicode"),
        (b"\xed\xa0\x80", "1", 3, "invalid_unicode"),
        ("lone \ud800", "1", 3, "invalid_unicode"),
        ("a", "\udfff", 3, "invalid_unicode"),
        ("a", b"\xff", 3, "invalid_unicode"),
    ],
)
def test_why_documents_are_left_out(text, id, score, reason):
    assert select(text, id, score, SCORED) == reason


@pytest.mark.parametrize("text", ["caf\u00e9", "caf\u00e9".encode()])
@pytest.mark.parametrize("id", ["7", b"7", 7])
def test_what_is_kept(text, id):
    split = "validation" if is_validation("7", 0.5) else "train"
    assert select(text, id, 3, SCORED) == Selected(split, "7", "caf\u00e9", 5)
    assert select(text, id, None, Selection(validation_fraction=0)).split == "train"


def test_without_ids_the_text_decides():
    selection = Selection(id_field="", validation_fraction=0.5)
    splits = set()
    for text in map(str, range(20)):
        chosen = select(text, None, None, selection)
        assert chosen.id == hashlib.sha256(text.encode()).hexdigest()
        assert (chosen.split == "validation") == is_validation(chosen.id, 0.5)
        splits.add(chosen.split)
    assert splits == {"train", "validation"}


def test_fields():
    assert Selection().fields == ("text", "id", None)
    assert Selection(id_field="", min_int_score=3).fields == ("text", None, "int_score")
    require_fields(["a", "text", "id"], Selection(), "x.parquet")
    with pytest.raises(InputError, match=r"--id_field is 'id', but x.parquet has no such column"):
        require_fields(["text"], Selection(), "x.parquet")
    with pytest.raises(InputError, match=r"--score_field is 'int_score', but x.parquet has no"):
        require_fields(["text", "id"], Selection(min_int_score=3), "x.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0, but it must be at least 0"),
        ({"text_field": ""}, "text_field is '', but it must be the name of a field"),
        ({"min_int_score": 3, "score_field": ""}, "score_field is '', but it must be"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(InputError, match=message):
        Selection(**change)
