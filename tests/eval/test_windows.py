import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyattn.errors import InputError
from lazyattn.eval.windows import Window, rolling_windows


@given(st.integers(2, 60), st.integers(1, 20), st.data())
def test_every_token_but_the_first_is_predicted_once(tokens, context, data):
    stride = data.draw(st.integers(1, context))
    windows = rolling_windows(tokens, context, stride)
    predicted = [token for window in windows for token in range(window.first, window.stop)]
    assert predicted == list(range(1, tokens))
    for window in windows:
        assert 0 <= window.start < window.first < window.stop <= tokens
        assert window.stop - window.start <= context + 1
    for window in windows[1:]:
        assert window.first - window.start >= context - stride + 1


def test_by_hand():
    assert rolling_windows(5, 8, 8) == [Window(0, 5, 1)]
    # Ten tokens after the first, as in the harness's own example.
    assert rolling_windows(11, 4, 4) == [Window(0, 5, 1), Window(4, 9, 5), Window(6, 11, 9)]
    assert rolling_windows(8, 4, 2) == [Window(0, 5, 1), Window(2, 7, 5), Window(3, 8, 7)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 4, 4), "the tokens of a document is 1, but it must be at least 2"),
        ((9, 4, 5), "--stride is 5, but it must be from 1 to the shortest context, 4"),
        ((9, 4, 0), "--stride is 0, but it must be from 1"),
    ],
)
def test_bad_windows(arguments, message):
    with pytest.raises(InputError, match=message):
        rolling_windows(*arguments)


def test_as_the_harness_cuts():
    utils = pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed")
    for tokens in range(2, 40):
        ids = list(range(tokens))
        expected = [
            (inputs, list(targets))
            for inputs, targets in utils.get_rolling_token_windows(ids[1:], 0, 7, 1)
        ]
        found = [
            (ids[w.start : w.stop - 1], ids[w.first : w.stop])
            for w in rolling_windows(tokens, 7, 7)
        ]
        assert found == expected
