import re
from pathlib import Path

from lazyattn.quantity import quantity

ROOT = Path(__file__).parents[1]


def test_one_and_several():
    assert [quantity(n, "token") for n in (0, 1, 2, 12345)] == [
        *("0 tokens", "1 token", "2 tokens", "12,345 tokens")
    ]
    assert quantity(1, "batch", "batches") == "1 batch"
    assert quantity(3, "batch", "batches") == "3 batches"


def test_messages_count_with_it():
    """Numbers of things in a message, but for what can't be one or is a rate."""
    things = "batches|microbatches|documents|heads|layers|pieces|shards|chips|devices|steps"
    pattern = re.compile(rf"\{{[^{{}}]+\}} ({things})\b(?! of | is )")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in (ROOT / "lazyattn").rglob("*.py")
        for match in pattern.finditer(path.read_text())
    ]
    assert [each for each in found if "{split} documents" not in each] == []
