import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.study import data
from lazyattn.errors import InputError
from tests.benchmarks.study.made_up import write_tokens


def test_documents_are_apart_and_their_ends_have_no_target():
    batch = data.packed(jnp.asarray([[5, 6, 2, 7, 8, 2, 9]]), eos=2)
    np.testing.assert_array_equal(batch["inputs"], [[5, 6, 2, 7, 8, 2]])
    np.testing.assert_array_equal(batch["targets"], [[6, 2, 7, 8, 2, 9]])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 0, 2, 2, 0]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 0, 0, 1, 0]])


def test_rows_are_cut_at_the_steps_places():
    stream = jnp.arange(40, dtype=jnp.uint16)
    starts = jnp.asarray([[0, 8], [16, 24]])
    cut = jax.jit(lambda step: data.cut(stream, starts, step, length=8, eos=39))
    np.testing.assert_array_equal(cut(1)["inputs"], [range(16, 24), range(24, 32)])
    np.testing.assert_array_equal(cut(1)["targets"], [range(17, 25), range(25, 33)])


def test_every_row_once_a_round_in_another_order():
    found = data.order(tokens=101, length=10, steps=5, batch=4, seed=3)
    assert found.epochs == 2.0
    first, second = found.starts.reshape(2, 10)
    for part in (first, second):
        np.testing.assert_array_equal(sorted(part), range(0, 100, 10))
    assert first.tolist() != second.tolist()
    other = data.order(tokens=101, length=10, steps=5, batch=4, seed=4)
    assert other.starts.tolist() != found.starts.tolist()


@pytest.mark.parametrize("length", [4, 8, 16])
def test_every_validation_token_is_a_target_once(length):
    text = np.asarray([*range(3, 30), 2], np.uint16)
    rows = data.rows_of(text, length, eos=2)
    batch = data.packed(jnp.asarray(rows), eos=2)
    targets = np.asarray(batch["targets"])[np.asarray(batch["segment_ids"]) > 0]
    np.testing.assert_array_equal(targets, text[1:])


def test_whole_documents():
    text = np.asarray([5, 6, 2, 7, 8, 9, 2, 10, 11, 12, 13, 2], np.uint16)
    np.testing.assert_array_equal(
        data.whole_documents(text, 3, 2, rows=5), [[7, 8, 9], [10, 11, 12]]
    )
    assert data.whole_documents(text, 5, 2, rows=5).shape == (0, 5)


def test_a_folder_that_lacks_something(tmp_path):
    folder = write_tokens(tmp_path / "data")
    tokens = data.read(folder)
    assert tokens.train.size == 4000
    assert tokens.eos == 2
    (tmp_path / "data" / "val_code.npy").unlink()
    with pytest.raises(InputError, match=r"--data is .* has val_code.npy"):
        data.read(folder)
    with pytest.raises(InputError, match=r"has train-"):
        data.read(str(tmp_path))
