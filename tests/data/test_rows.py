import pickle

import numpy as np

from lazyattn.data.packing import FIELDS
from lazyattn.data.rows import PackedRows


def test_rows_come_back_and_pickle_as_their_path(tmp_path):
    rng = np.random.default_rng(0)
    rows = {name: rng.integers(0, 99, (5, 7), np.int32) for name in FIELDS}
    PackedRows.write(tmp_path / "rows.npy", rows)
    written = PackedRows(tmp_path / "rows.npy")
    message = pickle.dumps(written)
    assert len(message) < 500
    for read in (written, pickle.loads(message)):
        assert (len(read), read.length) == (5, 7)
        for name in FIELDS:
            np.testing.assert_array_equal(read.column(name), rows[name])
            np.testing.assert_array_equal(read[3][name], rows[name][3])
            np.testing.assert_array_equal(read.block(1, 4)[name], rows[name][1:4])
            assert type(read[3][name]) is type(read.block(1, 4)[name]) is np.ndarray
    assert written.block(5, 5)["inputs"].shape == (0, 7)
