"""`decode_attention` refuses what does not fit, in one sentence."""

import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn import InputError, decode_attention

_CACHE = np.zeros((2, 40, 2, 16), np.float32)
_GOOD = {
    "query": np.zeros((2, 1, 4, 16), np.float32),
    "key_cache": _CACHE,
    "value_cache": _CACHE,
    "lengths": np.array([40, 3], np.int32),
}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"query": np.zeros((2, 9, 4, 16), np.float32)}, "new at most 8"),
        ({"query": np.zeros((2, 1, 3, 16), np.float32)}, "a divisor of 3 heads"),
        ({"key_cache": _CACHE.astype(np.float16)}, "float32 as query's, or int8"),
        ({"value_cache": _CACHE[:, :30]}, "that of keys"),
        ({"key_cache": _CACHE[None]}, "axis of layers"),
        ({"layer": 1}, "axis of layers"),
        ({"key_cache": _CACHE[None], "value_cache": _CACHE[None], "layer": 1}, "from 0 to 0"),
        ({"lengths": np.array([40, 3], np.float32)}, "must be integer"),
        ({"lengths": np.array([40])}, r"must be \(2,\)"),
        ({"offset": np.zeros(2, np.float32)}, r"must be \(4,\)"),
        ({"distance_slope": np.zeros(4, np.float32)}, "without distance_bias"),
        ({"key_norms": np.zeros((2, 2, 2), np.float32)}, r"must be \(2, 2, 1\)"),
        ({"key_scales": np.zeros((2, 2, 1), np.float32)}, "None for caches of float32"),
        (
            {"key_cache": _CACHE.astype(np.int8), "value_cache": _CACHE.astype(np.int8)},
            "given for int8",
        ),
        ({"head_groups": ((0,), (1,))}, "2 arrays, one for each group"),
        ({"head_groups": ((0, 0),), "key_cache": [_CACHE], "value_cache": [_CACHE]}, "once"),
        (
            {
                "head_groups": ((0,), (1,)),
                "key_cache": [_CACHE, _CACHE],
                "value_cache": [_CACHE, _CACHE],
            },
            "the heads of a group",
        ),
        ({"window": 0}, "at least 1"),
        ({"renormalize": True}, "False without an offset"),
        ({"skip_mass": 1.0}, "below 1"),
        ({"implementation": "cuda"}, "one of "),
    ],
)
def test_bad_input(change, words):
    with pytest.raises(InputError, match=words):
        decode_attention(**{**_GOOD, **change})


def test_plain_call():
    out = decode_attention(**_GOOD)
    assert out.shape == (2, 1, 4, 16) and out.dtype == jnp.float32
