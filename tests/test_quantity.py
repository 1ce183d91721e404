from lazyattn.quantity import duration, quantity


def test_one_and_several():
    assert [quantity(n, "token") for n in (0, 1, 2, 12345)] == [
        *("0 tokens", "1 token", "2 tokens", "12,345 tokens")
    ]
    assert quantity(1, "batch", "batches") == "1 batch"
    assert quantity(3, "batch", "batches") == "3 batches"


def test_durations():
    assert [duration(s) for s in (-1, 0, 59.6, 185, 7380, 363_600)] == [
        *("0s", "0s", "1m00s", "3m05s", "2h03m", "4d05h")
    ]
