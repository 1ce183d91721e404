"""What only the definition does: sink, soft cap, prefix, cross attention."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from lazyattn import InputError, cross_attention, lazy_attention
from lazyattn.attention import IMPLEMENTATIONS
from tests import oracle
from tests.naive import naive_attention

OTHERS = [name for name in IMPLEMENTATIONS if name != "xla"]
BY_NAME = {case.name: case for case in oracle.DEFINITION_ONLY}
SMALL = [case for case in oracle.DEFINITION_ONLY if case.shape[1] <= 100]


@functools.cache
def _jitted(**settings):
    """Returns the op as one compiled function: one by one, its steps take seconds to compile."""
    return jax.jit(lambda args: lazy_attention(**args, **settings))


def _exact(args):
    """Returns the arguments in float64."""
    return {
        name: x.astype(np.float64) if getattr(x, "dtype", None) == np.float32 else x
        for name, x in args.items()
    }


def _quick(cases, chosen):
    """Marks as slow what isn't chosen."""
    return [x if chosen(x.name) else pytest.param(x, marks=pytest.mark.slow) for x in cases]


@pytest.mark.parametrize(
    "case", _quick(oracle.DEFINITION_ONLY, lambda name: not name.endswith("_in_blocks")), ids=str
)
def test_definition_matches_row_by_row_numpy(case):
    args = oracle.inputs(case)
    true_out, true_weights = naive_attention(**args)
    settings = {name: args.pop(name) for name, _ in case.settings}
    with jax.enable_x64(True):
        out, weights = _jitted(return_weights=True, **settings)(_exact(args))
    _, _, alone = oracle.true_results(case)
    np.testing.assert_allclose(out, true_out, atol=1e-12)
    np.testing.assert_allclose(weights, true_weights, atol=1e-12)
    np.testing.assert_allclose(alone["out"], true_out, atol=1e-12)


@pytest.mark.parametrize("case", oracle.DEFINITION_ONLY, ids=str)
def test_output_and_gradients(case):
    oracle.check("xla", case)


@pytest.mark.parametrize("case", _quick(SMALL, lambda name: name == "all_at_once"), ids=str)
def test_gradients_against_finite_differences(case):
    args = _exact(oracle.inputs(case))
    arrays = {name: args.pop(name) for name in oracle.GRADIENTS if name in args}
    with jax.enable_x64(True):
        call = jax.jit(lambda arrays: lazy_attention(**arrays, **args))
        jax.test_util.check_grads(call, (arrays,), order=1, modes=["rev", "fwd"], eps=1e-6)


@pytest.mark.parametrize("name", ["sink_in_blocks", "prefix_in_blocks"])
@pytest.mark.parametrize("dtype", [np.float64, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_blocks_give_the_gradients_of_the_whole(name, dtype):
    case = BY_NAME[name]
    with jax.enable_x64(dtype == np.float64):
        args = _exact(oracle.inputs(case)) if dtype == np.float64 else oracle.inputs(case)
        for name in ("query", "key", "value"):
            args[name] = jnp.asarray(args[name], dtype)
        arrays = {name: args.pop(name) for name in oracle.GRADIENTS if name in args}

        def gradients(whole):
            def loss(arrays):
                out = lazy_attention(**arrays, **args, return_weights=whole)
                out = out[0] if whole else out
                wide = jnp.promote_types(out.dtype, jnp.float32)
                return jnp.sum(jnp.sin(3 * out.astype(wide)))

            return jax.jit(jax.grad(loss))(arrays)

        found, true = gradients(False), gradients(True)
        for name in true:
            error = oracle.relative_error(*(np.asarray(x[name], np.float64) for x in (found, true)))
            assert error < (1e-12 if dtype == np.float64 else 0.01), (name, error)


def test_memory_is_linear_in_length():
    """The weights of 16 blocks at once would be four times those of 4 blocks, squared."""

    def temporary(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)

        def loss(x):
            return lazy_attention(x, x, x, sink=jnp.zeros(2)).sum()

        program = jax.jit(jax.grad(loss)).lower(x).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 5 * temporary(1024)


@pytest.mark.parametrize("name", ["sink", "soft_cap", "prefix"])
@pytest.mark.parametrize("implementation", OTHERS)
def test_others_refuse_by_name(implementation, name):
    args = oracle.inputs(BY_NAME[name])
    message = f"implementation '{implementation}' can't do this call, since {name} is given and"
    with pytest.raises(InputError, match=message):
        lazy_attention(**args, implementation=implementation)


def test_a_sink_of_zero_is_a_key_of_zeros():
    """Softmax that adds one, as JAX's attention with a key that scores 0 and has no value."""
    args = oracle.inputs(BY_NAME["sink_of_softmax"])
    query, key, value = (args[name] for name in ("query", "key", "value"))
    length = query.shape[1]
    more = [np.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0))) for x in (key, value)]
    mask = np.pad(np.tril(np.ones((length, length), bool)), ((0, 0), (1, 0)), constant_values=True)
    true = jax.nn.dot_product_attention(query, *more, mask=mask[None, None])
    np.testing.assert_allclose(lazy_attention(**args), true, atol=2e-6)


def test_limits():
    args = oracle.inputs(oracle.Case("", shape=(2, 30, 2, 1, 8)))

    def call(**settings):
        return jax.jit(lambda: lazy_attention(**args, **settings))()

    plain = call(implementation="xla")
    none = np.zeros((2, 30), bool)
    np.testing.assert_array_equal(call(prefix=none), plain)
    np.testing.assert_allclose(call(soft_cap=1e4), plain, atol=5e-6)
    np.testing.assert_allclose(call(sink=np.full(2, -np.inf, np.float32)), plain, atol=1e-6)


def test_rows_that_see_nothing_are_zero_with_a_sink():
    args = oracle.inputs(oracle.Case("", bias="blind", tau=None))
    out = lazy_attention(**args, sink=np.zeros(2, np.float32))
    np.testing.assert_array_equal(out[:, :2], 0)
    assert np.isfinite(out).all() and np.any(out[:, 2:] != 0)


def test_a_whole_prefix_is_attention_that_is_not_causal():
    args = oracle.inputs(oracle.Case("", shape=(2, 40, 4, 2, 8), width=0, tau=None))
    out = lazy_attention(**args, prefix=np.ones((2, 40), bool))
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(**args), atol=2e-6)


def test_a_prefix_of_a_cache():
    case = oracle.Case("", shape=(1, 40, 2, 1, 8), prefix="some", documents=(25, 15))
    args = oracle.inputs(case)
    true = _jitted()(args)
    args["query"] = args["query"][:, 10:30]
    found = _jitted()(args | {"query_start": np.array([10])})
    np.testing.assert_allclose(found, true[:, 10:30], atol=1e-6)


def _cross(length=9, key_length=14, heads=4, kv_heads=2):
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, 8), *[(2, key_length, kv_heads, 8)] * 2]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_cross_attention_without_offset_is_jax_s():
    query, key, value = _cross()
    lengths = np.array([14, 5])
    call, true_call = jax.jit(cross_attention), jax.jit(jax.nn.dot_product_attention)
    settings = {"query_seq_lengths": np.array([9, 9]), "key_value_seq_lengths": lengths}
    true = true_call(query, key, value, **settings)
    np.testing.assert_allclose(call(query, key, value, key_lengths=lengths), true, atol=2e-6)
    true = true_call(query, key, value)
    np.testing.assert_allclose(call(query, key, value), true, atol=2e-6)


@pytest.mark.parametrize("length", [9, 300])
def test_cross_attention_is_the_last_row_of_self_attention(length):
    """Whose query sees all keys: once for each query."""
    query, key, value = _cross(length)
    settings = {
        "offset": np.array([-0.5, -1.0, 0.2, -0.1], np.float32),
        "sink": np.array([0.0, -1.0, 1.0, 0.5], np.float32),
        "soft_cap": 2.0,
    }
    for lengths in (np.array([14, 6]), None):
        out = jax.jit(functools.partial(cross_attention, **settings))(
            query, key, value, key_lengths=lengths
        )
        for row, number in enumerate([14, 14] if lengths is None else lengths):
            for i in (0, length - 1):
                last = np.zeros((1, number, 4, 8), np.float32)
                last[:, -1] = query[row, i]
                true, _ = naive_attention(
                    last, key[row : row + 1, :number], value[row : row + 1, :number], **settings
                )
                np.testing.assert_allclose(out[row, i], true[0, -1], atol=2e-6)


def test_cross_attention_weights_and_traced_lengths():
    query, key, value = _cross()
    out, weights = cross_attention(query, key, value, offset=-np.ones(4), return_weights=True)
    assert weights.shape == (2, 4, 9, 14) and weights.dtype == jnp.float32
    np.testing.assert_array_equal(out, cross_attention(query, key, value, offset=-np.ones(4)))
    call = jax.jit(lambda n: cross_attention(query, key, value, key_lengths=n))
    out = call(np.array([15, 14]))
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
    assert np.isnan(call(np.array([3, 0]))[1]).all()


def test_export_with_symbolic_shapes():
    def call(query, key, prefix, lengths):
        sink = jnp.zeros(2)
        out = lazy_attention(query, query, query, sink=sink, prefix=prefix)
        return out + cross_attention(query, key, key), cross_attention(
            query, key, key, key_lengths=lengths, sink=sink
        )

    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((2, n, 2, 8)).astype(np.float32) for n in (300, 12))
    given = query, key, rng.random((2, 300)) < 0.5, np.array([12, 5], np.int32)
    expected = jax.jit(call)(*given)
    batch, length, keys = jax.export.symbolic_shape("batch, length, keys")
    for rows in (length, 300):
        shapes = ((batch, rows, 2, 8), jnp.float32), ((batch, keys, 2, 8), jnp.float32)
        masks = ((batch, rows), bool), ((batch,), jnp.int32)
        arguments = [jax.ShapeDtypeStruct(*x) for x in (*shapes, *masks)]
        exported = jax.export.export(jax.jit(call))(*arguments)
        for found, true in zip(exported.call(*given), expected, strict=True):
            np.testing.assert_allclose(found, true, atol=3e-6)


QKV = _cross(14, heads=2, kv_heads=2)


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (lazy_attention, {"sink": np.zeros(3, np.float32)}, "sink.shape is \\(3,\\), .* \\(2,\\)."),
        (lazy_attention, {"sink": np.zeros(2, int)}, "sink.dtype is 'int32', .* floating."),
        (lazy_attention, {"soft_cap": 0.0}, "soft_cap is 0.0, .* None or a positive number."),
        (lazy_attention, {"soft_cap": jnp.ones(())}, "soft_cap is Array.*, but it must be None or"),
        (lazy_attention, {"prefix": np.ones((2, 3), bool)}, "prefix.shape is .* \\(2, 14\\)."),
        (lazy_attention, {"prefix": np.ones((2, 14))}, "prefix.dtype is 'float32', .* bool."),
        (cross_attention, {"sink": np.zeros(3, np.float32)}, "sink.shape is"),
        (cross_attention, {"soft_cap": -1}, "soft_cap is -1"),
        (cross_attention, {"offset": np.zeros(3)}, "offset.shape is \\(3,\\)"),
        (cross_attention, {"scale": np.inf}, "scale is inf"),
        (cross_attention, {"renormalize": True}, "renormalize is True"),
        (cross_attention, {"key_lengths": np.array([3])}, "key_lengths.shape is \\(1,\\)"),
        (cross_attention, {"key_lengths": np.ones(2)}, "key_lengths.dtype is 'float64'"),
        (cross_attention, {"key_lengths": np.array([0, 3])}, "key_lengths is \\[0, 3\\], .* 1 to"),
        (cross_attention, {"key_lengths": np.array([15, 3])}, "key_lengths is \\[15, 3\\]"),
        (
            cross_attention,
            {"implementation": "xla_chunked"},
            "implementation 'xla_chunked' can't do this call, since it is cross attention",
        ),
    ],
)
def test_errors(call, arguments, message):
    with pytest.raises(InputError, match=message):
        call(*QKV, **arguments)


def test_cross_attention_checks_arrays():
    query, key, value = QKV
    with pytest.raises(InputError, match=r"query.shape is \(2, 14, 2\), but it must be \[batch"):
        cross_attention(query[..., 0], key, value)
    with pytest.raises(InputError, match=r"key.shape is"):
        cross_attention(query, key[:1], value[:1])
    with pytest.raises(InputError, match=r"value.dtype is 'float16'"):
        cross_attention(query, key, value.astype(np.float16))
