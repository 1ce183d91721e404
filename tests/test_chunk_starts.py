"""Queries that are chunks of a sequence: what the whole sequence's call gives them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn import InputError, lazy_attention
from tests import oracle

IMPLEMENTATIONS = ("xla", "xla_chunked")
WINDOW = oracle.Case(
    "window", (1, 300, 2, 2, 16), documents=(120, 20, 170), settings=(("window", 90),)
)
CASES = [
    oracle.Case("several_tiles", shape=(1, 300, 2, 2, 16), width=64, bias="alibi", slope=True),
    oracle.Case("many_tiles", shape=(1, 1100, 2, 1, 16), width=128, bias="steep", slope=True),
    oracle.Case("documents", documents=(17, 3, 1, 40, 1), shape=(2, 152, 2, 2, 16)),
    oracle.Case("positive_tau", tau=(0.5, -0.5), shape=(1, 300, 4, 2, 16), bias="steep"),
    oracle.Case("softmax", tau=None, width=0, shape=(2, 40, 2, 2, 16)),
    oracle.Case("renormalized", settings=(("renormalize", True),), shape=(1, 140, 2, 2, 16)),
    WINDOW,
]

# The window's case has documents too, and the chunk of odd size has neither.
SLOW = tuple(case.name for case in CASES if case is not WINDOW)


def part(case, number, taken):
    """Returns (rows of the chunks `taken`, their starts) where there are `number` chunks."""
    size = case.shape[1] // number
    starts = np.array(taken, np.int32) * size
    return np.concatenate([np.arange(start, start + size) for start in starts]), starts


def chunk_results(implementation, case, number, taken):
    """Returns what the chunks get alone, and what the whole sequence gives them."""
    true_args, true_d_out, _ = oracle.true_results(case)
    rows, starts = part(case, number, taken)
    inside = np.zeros(case.shape[1], bool)
    inside[rows] = True
    d_out = true_d_out * inside[:, None, None]
    with jax.enable_x64(True):
        exact = {
            name: x.astype(np.float64) if getattr(x, "dtype", None) == np.float32 else x
            for name, x in true_args.items()
        }
        true = oracle.out_and_gradients(exact, "xla", d_out)
    for name in ("out", "query"):
        true[name] = true[name][:, rows]
    args = {**true_args, "query": true_args["query"][:, rows], "chunk_starts": starts}
    # Traced, as a shard's place is.
    arrays = {name: jnp.asarray(x) for name, x in args.items() if hasattr(x, "dtype")}
    floats = {name: x for name, x in arrays.items() if name in oracle.GRADIENTS}
    rest = {name: x for name, x in arrays.items() if name not in floats}
    settings = {name: x for name, x in args.items() if name not in arrays}

    @jax.jit
    def run(floats, rest, d_out):
        def call(floats):
            return lazy_attention(**floats, **rest, **settings, implementation=implementation)

        out, vjp = jax.vjp(call, floats)
        return {"out": out} | vjp(d_out)[0]

    found = run(floats, rest, jnp.asarray(d_out[:, rows], jnp.float32))
    return {name: np.asarray(x, np.float64) for name, x in found.items()}, true


def check_chunks(implementation, case, number, taken):
    found, true = chunk_results(implementation, case, number, taken)
    errors = {name: oracle.relative_error(found[name], true[name]) for name in true}
    worse = {
        name: error
        for name, error in errors.items()
        if not error <= (1e-4 if name in oracle.SUMMED else 1e-5)
    }
    assert not worse, errors


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("taken", [(0, 3), pytest.param((1, 2), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        case if case.name not in SLOW else pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
    ],
    ids=str,
)
def test_output_and_gradients(case, taken, implementation):
    check_chunks(implementation, case, 4, taken)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_chunk_of_odd_size_anywhere(implementation):
    case = oracle.Case("odd", shape=(1, 405, 2, 2, 16), width=64, bias="alibi", slope=True)
    check_chunks(implementation, case, 3, (1,))


def test_what_chunk_starts_may_be():
    query, key = np.zeros((1, 6, 2, 4), np.float32), np.zeros((1, 12, 2, 4), np.float32)

    def call(chunk_starts, **more):
        lazy_attention(query, key, key, chunk_starts=np.array(chunk_starts), **more)

    with pytest.raises(InputError, match=r"chunk_starts.shape is \(4,\), .* a divisor of 6 chunks"):
        call([0, 1, 2, 3])
    with pytest.raises(InputError, match=r"chunk_starts is \[0, 10\], .* from 0 to 9"):
        call([0, 10])
    with pytest.raises(InputError, match=r"chunk_starts is \[5, 3\], .* at least 3 apart"):
        call([5, 3])
    with pytest.raises(InputError, match=r"chunk_starts.dtype is 'float64', .* integer"):
        call([0.0, 3.0])
    with pytest.raises(InputError, match="query_start and chunk_starts are both given"):
        call([0, 3], query_start=np.zeros(1, np.int32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("start", [-1, 10, pytest.param(12, marks=pytest.mark.slow)])
def test_a_chunk_outside_the_keys_is_not_attention(start, implementation):
    args = oracle.inputs(oracle.Case("outside", shape=(1, 12, 2, 2, 4)))
    args["query"] = args["query"][:, :6]

    def call(chunk_starts, key):
        arrays = args | {"key": key, "chunk_starts": chunk_starts}
        return lazy_attention(**arrays, implementation=implementation)

    out, vjp = jax.vjp(jax.jit(call), jnp.array([4, start]), jnp.asarray(args["key"]))
    assert np.all(np.isfinite(out[:, :3])) and np.all(np.isnan(out[:, 3:]))
    assert np.any(np.isnan(vjp(jnp.ones_like(out))[1]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "starts",
    [
        (4, 5),
        pytest.param((6, 4), marks=pytest.mark.slow),
        pytest.param((8, 30), marks=pytest.mark.slow),
    ],
)
def test_chunks_that_overlap_are_not_attention(starts, implementation):
    args = oracle.inputs(oracle.Case("overlap", shape=(1, 12, 2, 2, 4)))
    args["query"] = args["query"][:, :6]
    call = jax.jit(lambda x: lazy_attention(**args, chunk_starts=x, implementation=implementation))
    assert np.all(np.isnan(call(jnp.array(starts))))


def test_known_starts_are_checked_inside_jit():
    query, key = np.zeros((1, 6, 2, 4), np.float32), np.zeros((1, 12, 2, 4), np.float32)

    def call(key, starts):
        return jax.jit(lambda key: lazy_attention(query, key, key, **starts))(key)

    assert call(key, {"chunk_starts": np.array([0, 9])}).shape == query.shape
    assert call(key, {"query_start": jnp.array([6])}).shape == query.shape
    with pytest.raises(InputError, match="chunk_starts is"):
        call(key, {"chunk_starts": jnp.array([0, 10])})
    with pytest.raises(InputError, match="query_start is"):
        call(key, {"query_start": np.array([7])})
