"""Which calls the Triton decode kernels take, what they say otherwise, and that they compile."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from lazyattn import InputError, decode_attention
from pallas_kernels import target

CACHE = np.zeros((1, 40, 2, 16), np.float32)
ARGS = {
    "query": np.zeros((1, 1, 2, 16), np.float32),
    "key_cache": CACHE,
    "value_cache": CACHE,
    "lengths": np.array([40], np.int32),
}


def _refusal(capability, **changes):
    with target.compile_for(f"sm{capability}"), pytest.raises(InputError) as error:
        decode_attention(**(ARGS | changes), implementation="triton")
    return str(error.value)


def test_what_is_refused_by_name():
    assert "compute capability is 7.5" in _refusal(75)
    large = jax.ShapeDtypeStruct((1, 2**21, 8, 128), np.float32)
    query = jax.ShapeDtypeStruct((1, 1, 8, 128), np.float32)

    def call(query, cache):
        changes = {"query": query, "key_cache": cache, "value_cache": cache}
        assert "2**31 numbers or more" in _refusal(90, **changes)
        return query

    jax.eval_shape(call, query, large)


def test_asked_for_by_name_without_a_gpu():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="it needs an NVIDIA GPU and JAX runs on 'cpu'"):
        decode_attention(**ARGS, implementation="triton")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spills(capability):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.decode_static", f"--capability={capability}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "decode_softmax" in done.stdout and "decode_values" in done.stdout
