import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lazyattn.data.prepare.chat import chat_text
from lazyattn.data.prepare.inputs import make_plan
from lazyattn.data.prepare.readers import read_unit
from lazyattn.data.prepare.selection import (
    INVALID_UNICODE,
    MISSING_TEXT,
    Selected,
    Selection,
    select,
)
from lazyattn.errors import InputError

TEMPLATE = "<|{role}|>\n{content}\n"
CHAT = [{"role": "user", "content": "Why {so}?"}, {"role": "assistant", "content": "<|user|>"}]
TEXT = "<|user|>\nWhy {so}?\n<|assistant|>\n<|user|>\n"
SELECTION = Selection(text_field="messages", chat_template=TEMPLATE)


def test_a_chat_is_one_document():
    assert chat_text(CHAT, TEMPLATE) == TEXT
    found = select(CHAT, "a", None, SELECTION)
    assert isinstance(found, Selected) and found.text == TEXT and found.size == len(TEXT)


@pytest.mark.parametrize(
    "messages",
    [None, [], "text", b"text", {}, ["a"], [{"role": "a"}], [{"role": 1, "content": ""}]],
)
def test_what_is_no_chat(messages):
    assert select(messages, "a", None, SELECTION) == MISSING_TEXT


def test_half_a_surrogate_in_a_chat():
    assert select([{"role": "a", "content": "\ud800"}], "a", None, SELECTION) == INVALID_UNICODE


@pytest.mark.parametrize(
    "template", ["", "{role}", "{content", "{content!r}", "{content:>9}", "{content}{name}", "{}"]
)
def test_templates_that_say_something_else(template):
    with pytest.raises(InputError, match=r"^--chat_template is .*, but it must be text with {con"):
        Selection(chat_template=template)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json"])
def test_chats_of_files(kind, tmp_path):
    documents = [{"id": str(i), "messages": CHAT * (1 + i)} for i in range(70)]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(documents), path, row_group_size=30)
    else:
        lines = "\n".join(map(json.dumps, documents))
        path.write_text(lines if kind == "jsonl" else json.dumps(documents))
    plan = make_plan([str(path)], SELECTION, 10**6)
    assert all(unit.weight > 100 for unit in plan.units)
    rows = [row for unit in plan.units for row in read_unit(unit, SELECTION)]
    chosen = [select(row.text, row.id, row.score, SELECTION) for row in rows]
    assert [each.text for each in chosen] == [TEXT * (1 + i) for i in range(70)]


@pytest.mark.parametrize("kind", ["csv", "txt"])
def test_files_without_messages(kind, tmp_path):
    (tmp_path / f"a.{kind}").write_text("messages,id\n")
    with pytest.raises(InputError, match=rf"--chat_template is given, but .* is a \.{kind} file"):
        make_plan([str(tmp_path)], SELECTION, 10**6)
