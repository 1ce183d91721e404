import numpy as np
import pytest
from absl import flags

from lazyattn import distributed
from lazyattn.errors import InputError


def _flags(*arguments):
    values = flags.FlagValues()
    distributed.define(values)
    values(["program", *arguments])
    return values


def test_without_flags_there_is_one_process():
    distributed.initialize(_flags())
    assert distributed.Agreement()(True)
    assert not distributed.Agreement()(False)
    distributed.wait_for_all("nobody else")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--process_id=1",), "--process_id is 1, but --coordinator, which it needs, is not given"),
        (("--process_count=2",), "--process_count is 2, but --coordinator, which it needs"),
        (("--coordinator=here",), "--coordinator is 'here', but it must be HOST:PORT or auto"),
        (("--coordinator=h:1", "--process_count=0"), "--process_count is 0, .* at least 1"),
        (
            ("--coordinator=h:1", "--process_id=2", "--process_count=2"),
            "--process_id is 2, .* below --process_count = 2",
        ),
    ],
)
def test_flags_that_do_not_go_together(arguments, message):
    with pytest.raises(InputError, match=message):
        distributed.initialize(_flags(*arguments))


def test_rows_of_a_share_are_taken_once(monkeypatch):
    def everyone(rows):
        return np.stack([rows + 10 * process for process in range(4)])

    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", everyone)
    rows = np.array([[1], [2]], np.int32)
    found = distributed.gather_rows(rows, [1, 1, 0, 0])
    np.testing.assert_array_equal(found[:, 0], [21, 22, 1, 2])
