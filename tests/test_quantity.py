from lazyattn.quantity import quantity


def test_one_and_several():
    assert [quantity(n, "token") for n in (0, 1, 2, 12345)] == [
        *("0 tokens", "1 token", "2 tokens", "12,345 tokens")
    ]
    assert quantity(1, "batch", "batches") == "1 batch"
    assert quantity(3, "batch", "batches") == "3 batches"
