import jax.numpy as jnp
import numpy as np

from lazyattn.call import document_positions


def test_document_positions_restart_with_every_run():
    ids = jnp.array([[1, 1, 1, 2, 0, 0], [3, 1, 1, 3, 3, 3]])
    np.testing.assert_array_equal(document_positions(ids), [[0, 1, 2, 0, 0, 1], [0, 0, 1, 0, 1, 2]])
