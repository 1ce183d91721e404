"""The public op: every implementation against the definition, and its own checks."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from lazyattn import InputError, lazy_attention
from pallas_kernels.chunked.forward import HeadInputs, elastic_softmax
from tests import oracle
from tests.naive import naive_attention
from tests.pallas_kernels import kernel_suite

IMPLEMENTATIONS = ("xla", "xla_chunked")
GOLDEN = ("paper_init", "positive_tau", "sharp_scores")


# Cases that only `make test-all` tries with "xla_chunked": others have their branches with other
# lengths or settings, and each takes a compilation of its own. "xla" does all of them.
ALIKE_IN_CHUNKS = {
    "many_tiles",
    "bumpy_bias",
    "table_of_one",
    "no_bias",
    "multi_query",
    "two_tokens",
    "odd_length",
    "constant_offset",
    "own_scale",
    "window",
    "window_of_softmax",
    "window_of_one",
    "window_renormalized",
    "sharp",
    "table_longer_than_sequence",
    "length_offset",
    "visit_everything",
}
# Of these "xla" is nearly what "xla_chunked" is held to.
IN_CHUNKS = [pytest.param("xla", marks=pytest.mark.slow), "xla_chunked"]
# What takes "xla_chunked" long to compile; it does the same for both.
AT_ONCE = ["xla", pytest.param("xla_chunked", marks=pytest.mark.slow)]
# Cases whose weights, too, are compared row by row; with others `make test-all` does.
WEIGHTS = {
    "paper",
    "tau_zero",
    "everything_dead",
    "learned_tau_of_both_signs",
    "positive_tau_with_steep_bias",
    "no_tail",
    "sharp_scores",
    "documents",
    "one_token_documents",
    "renormalized",
    "window_in_documents",
}


@functools.cache
def _jitted(implementation, **settings):
    """Returns the op as one compiled function: one by one, its steps take seconds to compile."""
    return jax.jit(lambda args: lazy_attention(**args, **settings, implementation=implementation))


@functools.cache
def _row_by_row(case):
    return naive_attention(**oracle.inputs(case))


@pytest.mark.parametrize("case", oracle.CASES, ids=str)
def test_definition_matches_row_by_row_numpy(case):
    _, _, exact = oracle.true_results(case)
    np.testing.assert_allclose(exact["out"], _row_by_row(case)[0], atol=1e-12)


@pytest.mark.parametrize("case", kernel_suite.in_interpreters(oracle.CASES, WEIGHTS), ids=str)
def test_weights_match_row_by_row_numpy(case):
    args = oracle.inputs(case)
    settings = {name: args.pop(name) for name, _ in case.settings}
    with jax.enable_x64(True):
        exact = {k: np.float64(x) if x.dtype == np.float32 else x for k, x in args.items()}
        out, weights = _jitted("xla", return_weights=True, **settings)(exact)
    true_out, true_weights = _row_by_row(case)
    np.testing.assert_allclose(out, true_out, atol=1e-12)
    np.testing.assert_allclose(weights, true_weights, atol=1e-12)


@pytest.mark.parametrize("case", oracle.CASES, ids=str)
def test_output_and_gradients(case):
    oracle.check("xla", case)


CHUNKED = {case.name for case in oracle.CASES} - ALIKE_IN_CHUNKS


@pytest.mark.parametrize("case", kernel_suite.in_interpreters(oracle.CASES, CHUNKED), ids=str)
def test_output_and_gradients_in_chunks(case):
    oracle.check("xla_chunked", case)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(name, implementation):
    folder = os.environ.get("LAZYATTN_TEST_DATA")
    if not folder:
        pytest.skip("LAZYATTN_TEST_DATA does not name a folder with golden/*.npz")
    golden = np.load(pathlib.Path(folder) / "golden" / f"{name}.npz")

    def ours(array):
        return np.swapaxes(golden[array], 1, 2)

    args = {"query": ours("q"), "key": ours("k"), "value": ours("v")}
    args |= {"distance_bias": golden["bias"], "offset": golden["tau"]}
    found = oracle.out_and_gradients(args, implementation, ours("dout"))
    true = {"out": ours("f64_out"), "query": ours("f64_dq"), "key": ours("f64_dk")}
    true |= {"value": ours("f64_dv"), "distance_bias": golden["f64_dbias"]}
    true |= {"offset": golden["f64_dtau"]}
    errors = {k: oracle.relative_error(found[k], true[k]) for k in true}
    assert all(error <= 1e-5 for error in errors.values()), errors
    authors = oracle.relative_error(found["out"], ours("authors_out"))
    assert authors <= 1e-5


@pytest.mark.parametrize("implementation", AT_ONCE)
@pytest.mark.parametrize("tau", [-0.6, 0.4, pytest.param(None, marks=pytest.mark.slow)])
def test_gradients_against_finite_differences(implementation, tau):
    case = oracle.Case(
        "small", shape=(1, 13, 2, 1, 4), width=6, slope=True, tau=None if tau is None else (tau,)
    )
    args = oracle.inputs(case, seed=3)
    args["segment_ids"] = oracle.segment_ids((8, 5), 1, 13)
    with jax.enable_x64(True):
        arrays = {k: jnp.asarray(args.pop(k), jnp.float64) for k in oracle.GRADIENTS if k in args}
        jax.test_util.check_grads(
            jax.jit(lambda arrays: lazy_attention(**arrays, **args, implementation=implementation)),
            (arrays,),
            order=1,
            modes=["rev"],
            eps=1e-6,
        )


@pytest.mark.slow
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    length=st.integers(1, 290),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 16]),
    width=st.integers(0, 300),
    slope=st.booleans(),
    bias=st.sampled_from(["normal", "alibi", "bumpy", "steep"]),
    tau=st.sampled_from([None, (-1.0,), (-0.3, 0.4), (2.0,)]),
    documents=st.none() | st.lists(st.integers(1, 200), min_size=1, max_size=4).map(tuple),
    window=st.none() | st.integers(1, 300),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    length, kv_heads, group, head_dim, width, slope, bias, tau, documents, window, seed
):
    shape = (1, length, kv_heads * group, kv_heads, head_dim)
    settings = (("window", window),)
    case = oracle.Case("any", shape, width, bias, slope, tau, documents, settings)
    oracle.check("xla_chunked", case, seed=seed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_softmax_limit(implementation):
    """No bias, tau 0 or none: ordinary attention, as JAX has it."""
    args = oracle.inputs(oracle.Case("limit", shape=(2, 150, 4, 2, 16), width=0, tau=(0.0,)))
    offset = args.pop("offset")
    true = jax.nn.dot_product_attention(*args.values(), is_causal=True)
    for kwargs in ({}, {"offset": offset}):
        out = _jitted(implementation)(args | kwargs)
        np.testing.assert_allclose(out, true, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_first_token_attends_to_nothing(implementation):
    args = oracle.inputs(oracle.Case("first", documents=(30,), shape=(1, 60, 2, 2, 16)))
    out = np.asarray(_jitted(implementation)(args))
    np.testing.assert_array_equal(out[:, [0, 30]], 0)
    assert np.all(np.any(out[:, 40:50] != 0, axis=(2, 3)))


def test_rounding_leaves_nothing_of_a_first_weight():
    """Of a softmax weight just above 1, that is; renormalization would make it 1 again."""
    rest = dict.fromkeys(("query", "key", "value", "bias", "segment_start", "span"))
    scale = jnp.array([1.0, 0.5, np.nan])
    head = HeadInputs(**rest, offset=jnp.float32(-1.0), offset_scale=scale)
    softmax = jnp.full((3, 1), np.nextafter(np.float32(1), np.float32(2)))
    weights, live = elastic_softmax(softmax, head.threshold, jnp.ones((3, 1), bool))
    np.testing.assert_array_equal(live[:, 0], [False, True, True])
    assert weights[0] == 0 and weights[1] > 0.4 and np.isnan(weights[2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tau", [-1.0, 0.5])
def test_causality_and_document_isolation(implementation, tau):
    case = oracle.Case("isolated", shape=(1, 200, 2, 2, 16), tau=(tau,), documents=(90, 110))
    args = oracle.inputs(case)
    call = _jitted(implementation)
    before = np.asarray(call(args))
    changed = {k: v.copy() for k, v in args.items()}
    for name in ("query", "key", "value"):
        changed[name][:, 150:] = 7.0
        changed[name][:, :90] = -3.0
    after = np.asarray(call(changed))
    np.testing.assert_array_equal(before[:, 90:150], after[:, 90:150])
    assert not np.allclose(before[:, 151:], after[:, 151:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision_is_near_float64(implementation, dtype):
    case = oracle.Case("half", shape=(2, 150, 4, 2, 32), width=64, bias="alibi", slope=True)
    args, d_out, true = oracle.true_results(case)
    args = dict(args)
    for name in ("query", "key", "value"):
        args[name] = jnp.asarray(args[name], dtype)
    found = oracle.out_and_gradients(args, implementation, d_out)
    # Rounding flips entries near the threshold; the offset's gradient counts them.
    bound = {"bfloat16": 0.015, "float16": 0.006}[dtype]
    errors = {name: oracle.relative_error(found[name], true[name]) for name in true}
    assert errors.pop("offset") <= 0.03
    assert all(error <= bound for error in errors.values()), errors
    assert jax.eval_shape(_jitted(implementation), args).dtype == dtype


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_query_may_have_a_divisor_of_its_own(implementation):
    args = oracle.inputs(oracle.Case("divisors", tau=(-0.9, -0.4)))
    args = {name: x for name, x in args.items() if name != "segment_ids"}
    batch, length = args["query"].shape[:2]
    divisors = np.full((batch, length), 20.0, np.float32)
    divisors[:, length // 2 :] = 3.0
    found = _jitted(implementation)(args | {"offset_divisor": divisors})
    first, last = (np.asarray(_jitted("xla", offset_divisor=x)(args)) for x in (20.0, 3.0))
    expected = np.concatenate([first[:, : length // 2], last[:, length // 2 :]], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
    assert np.abs(np.asarray(found) - np.asarray(first)).max() > 1e-3


@pytest.mark.parametrize("implementation", IN_CHUNKS)
@pytest.mark.parametrize("divisor", ["visible", pytest.param(1.0, marks=pytest.mark.slow)])
def test_sums_of_values_do_not_overflow_float16(divisor, implementation):
    check_large_values(implementation, divisor)


def check_large_values(implementation, divisor, length=1800, head_dim=16):
    """Sums of values are above 65,504, the most that float16 holds; nothing else is."""
    case = oracle.Case("large", shape=(1, length, 1, 1, head_dim), width=0)
    args = oracle.inputs(case)
    args["value"] += 72000 / length
    args["offset"] = np.array([-0.5 if divisor == "visible" else -0.5 / length], np.float32)
    args["offset_divisor"] = divisor
    for name in ("query", "key", "value"):
        args[name] = np.asarray(jnp.asarray(args[name], jnp.float16))
    d_out = np.full(args["query"].shape, 1 / length)
    with jax.enable_x64(True):
        exact = {
            name: np.asarray(x, np.float64) if name in oracle.GRADIENTS else x
            for name, x in args.items()
        }
        true = oracle.out_and_gradients(exact, "xla", d_out)
    found = oracle.out_and_gradients(args, implementation, d_out)
    errors = {name: oracle.relative_error(found[name], true[name]) for name in true}
    # dQ and dK are small differences of large numbers.
    bounds = dict.fromkeys(true, 5e-4) | dict.fromkeys(("query", "key"), 0.02)
    assert all(error <= bounds[name] for name, error in errors.items()), errors


@pytest.mark.parametrize(
    "dtype, bound", [("float16", 6e-4), pytest.param("bfloat16", 8e-3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("implementation", IN_CHUNKS)
def test_renormalized_weights_in_half_precision(implementation, dtype, bound):
    """Weights are small here: most of them are no normal numbers of float16."""
    case = oracle.Case("small", shape=(1, 1500, 1, 1, 16), width=0, score_scale=0.5)
    args = oracle.inputs(case) | {"renormalize": True}
    for name in ("query", "key", "value"):
        args[name] = np.asarray(jnp.asarray(args[name], dtype))
    d_out = np.random.default_rng(1).standard_normal(args["query"].shape)
    with jax.enable_x64(True):
        exact = {
            name: np.asarray(x, np.float64) if name in oracle.GRADIENTS else x
            for name, x in args.items()
        }
        true = oracle.out_and_gradients(exact, "xla", d_out)
    found = oracle.out_and_gradients(args, implementation, d_out)
    errors = {name: oracle.relative_error(found[name], true[name]) for name in true}
    assert all(error <= bound for error in errors.values()), errors


def test_threshold_is_not_rounded_to_the_input_dtype():
    """At length 2,000 tau / n is far below bfloat16's spacing at p: it must still count."""
    args = oracle.inputs(oracle.Case("fine", shape=(1, 2000, 1, 1, 8), width=0, score_scale=0.0))
    args = {k: jnp.asarray(v, jnp.bfloat16) if v.ndim == 4 else v for k, v in args.items()}
    # Equal scores: p = 1 / n exactly, so half of it is left everywhere.
    args["offset"] = np.array([-0.5], np.float32)
    for implementation in IMPLEMENTATIONS:
        out = np.asarray(_jitted(implementation)(args).astype(jnp.float32))
        value = np.asarray(args["value"].astype(jnp.float32))
        np.testing.assert_allclose(out[0, -1, 0], 0.5 * value[0, :, 0].mean(0), atol=2e-3)
    _, weights = _jitted("xla", return_weights=True)(args)
    np.testing.assert_allclose(np.asarray(weights)[0, 0, -1], 0.5 / 2000, rtol=1e-4)


@pytest.mark.parametrize("start", [0, 5])
def test_key_value_cache_gives_the_rows_of_the_whole_call(start):
    case = oracle.Case("cache", shape=(2, 40, 4, 2, 16), documents=(13, 27), slope=True)
    args = oracle.inputs(case)
    whole = np.asarray(_jitted("xla")(args))
    starts = np.array([start, start + 20], np.int32)
    args["query"] = np.stack([args["query"][b, s : s + 3] for b, s in enumerate(starts)])
    # Keys after the queries are what a cache holds beyond its length: anything.
    for b, s in enumerate(starts):
        args["key"][b, s + 3 :] = 1e4
        args["value"][b, s + 3 :] = 1e4
    part = np.asarray(_jitted(None)(args | {"query_start": starts}))
    for b, s in enumerate(starts):
        np.testing.assert_allclose(part[b], whole[b, s : s + 3], atol=1e-5)


def test_a_window_with_a_key_value_cache():
    case = oracle.Case("cache", shape=(2, 40, 2, 2, 16), documents=(25, 15))
    args = oracle.inputs(case)
    whole = np.asarray(_jitted("xla", window=7)(args))
    starts = np.array([3, 22], np.int32)
    args["query"] = np.stack([args["query"][b, s : s + 6] for b, s in enumerate(starts)])
    part = np.asarray(_jitted(None, window=7)(args | {"query_start": starts}))
    for b, s in enumerate(starts):
        np.testing.assert_allclose(part[b], whole[b, s : s + 6], atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [pytest.param(150, marks=pytest.mark.slow), np.int64(1000)])
def test_a_window_of_the_whole_length_changes_no_bit(window, implementation):
    case = oracle.Case("whole", shape=(1, 150, 2, 1, 16), documents=(90, 60))
    args, d_out = oracle.inputs(case), np.ones((1, 150, 2, 16), np.float32)
    true = oracle.out_and_gradients(args, implementation, d_out)
    found = oracle.out_and_gradients(args | {"window": window}, implementation, d_out)
    for name in true:
        np.testing.assert_array_equal(found[name], true[name])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_before_the_window_do_not_matter(implementation):
    args = oracle.inputs(oracle.Case("window", shape=(1, 300, 2, 2, 16), tau=(0.5,)))
    call = _jitted(implementation, window=60)
    before = np.asarray(call(args))
    args["key"][:, :150], args["value"][:, :150] = 7.0, -3.0
    after = np.asarray(call(args))
    # The last query that sees key 149 is 208.
    assert not np.allclose(before[:, 208], after[:, 208])
    np.testing.assert_array_equal(before[:, 209:], after[:, 209:])


@pytest.mark.parametrize("start", [-1, 38, 40, 1000])
def test_queries_without_a_key_are_not_attention(start):
    args = oracle.inputs(oracle.Case("cache", shape=(2, 40, 4, 2, 16), documents=(13, 27)))
    args["query"] = args["query"][:, :3]
    with pytest.raises(InputError, match=rf"query_start is \[5, {start}\], .* from 0 to 37"):
        lazy_attention(**args, query_start=np.array([5, start]))

    @jax.jit
    def traced(starts, value):
        def call(value):
            out, weights = lazy_attention(
                **args | {"value": value}, query_start=starts, return_weights=True
            )
            return out, weights

        (out, weights), vjp = jax.vjp(call, value)
        return out, weights, vjp((jnp.ones_like(out), jnp.zeros_like(weights)))[0]

    out, weights, d_value = traced(np.array([5, start]), args["value"])
    exists = [0 <= start + i < 40 for i in range(3)]
    for x in (out[1], weights[1].swapaxes(0, 1)):
        for found, exist in zip(np.asarray(x), exists, strict=True):
            assert np.all(np.isfinite(found)) if exist else np.all(np.isnan(found))
    assert np.all(np.isfinite(out[0])) and np.all(np.isfinite(d_value[0]))
    assert np.any(np.isnan(d_value[1]))
    known = jax.jit(lambda: lazy_attention(**args, query_start=np.array([5, 0])))()
    np.testing.assert_allclose(known[0], out[0], atol=1e-6)


def test_skipping_changes_less_than_the_bound():
    case = oracle.Case("skip", shape=(1, 1100, 2, 2, 16), width=128, bias="steep", slope=True)
    args = oracle.inputs(case)
    whole, cut = (_jitted("xla_chunked", skip_mass=mass)(args) for mass in (0.0, 1e-2))
    difference = np.abs(np.asarray(whole) - np.asarray(cut)).max()
    assert difference <= 2 * 1e-2 * np.abs(args["value"]).max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["query", "key", "offset"])
def test_not_a_number_stays_one(name, implementation):
    """Elastic-Softmax may set weights to 0, but never those that aren't numbers."""
    args = oracle.inputs(oracle.Case("nan", shape=(1, 300, 2, 2, 16), bias="steep", slope=True))
    where = {"query": (0, 200, 1, 3), "key": (0, 5, 1, 3), "offset": (1,)}[name]
    args[name][where] = np.nan
    out = np.asarray(_jitted(implementation)(args))
    rows = {"query": slice(200, 201), "key": slice(5, None), "offset": slice(None)}[name]
    assert np.all(np.isnan(out[0, rows, 1]))
    assert np.all(np.isfinite(out[0, :, 0]))


@pytest.mark.parametrize("implementation", IN_CHUNKS)
def test_bias_of_minus_infinity_near_the_diagonal(implementation):
    oracle.check_blind_rows(implementation)


@pytest.mark.parametrize("implementation", IN_CHUNKS)
def test_gradient_of_an_offset_of_zero(implementation):
    oracle.check_gradient_of_an_offset_of_zero(implementation)


def test_gradients_of_rows_that_see_nothing_stay_with_what_they_see():
    case = oracle.Case("", (1, 200, 2, 1, 16), 64, "alibi", True, documents=(120, 80))
    args = oracle.inputs(case)
    args["distance_bias"][:, 0] = -np.inf
    floats = {name: x for name, x in args.items() if name in oracle.GRADIENTS}

    def loss(floats, implementation):
        out = lazy_attention(**args | floats, implementation=implementation)
        return jnp.where(jnp.isnan(out), 0, out).sum()

    true, found = (jax.jit(jax.grad(loss), static_argnums=1)(floats, n) for n in IMPLEMENTATIONS)
    assert np.isnan(true["key"][0, :, 0]).any(-1).nonzero()[0].tolist() == [0, 120]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-4), true, found)


@pytest.mark.parametrize("window", [None, pytest.param(50, marks=pytest.mark.slow)])
def test_works_under_vmap_scan_and_remat(window):
    args = oracle.inputs(oracle.Case("stacked", shape=(3, 140, 2, 2, 8)))
    shared = {k: args.pop(k) for k in ("distance_bias", "offset")}

    def loss(shared, rows, implementation="xla_chunked"):
        rows = {k: v[None] for k, v in rows.items()}
        settings = {"window": window, "implementation": implementation}
        return jnp.sum(lazy_attention(**rows, **shared, **settings) ** 2)

    def by_vmap(shared):
        return jax.vmap(lambda rows: loss(shared, rows))(args).sum()

    def by_scan(shared):
        step = jax.checkpoint(lambda total, rows: (total + loss(shared, rows), None))
        return jax.lax.scan(step, 0.0, args)[0]

    def plain(shared):
        return sum(loss(shared, {k: v[b] for k, v in args.items()}, "xla") for b in range(3))

    true = jax.jit(jax.value_and_grad(plain))(shared)
    for form in (by_vmap, by_scan):
        found = jax.jit(jax.value_and_grad(form))(shared)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, true
        )


@pytest.mark.parametrize("implementation", AT_ONCE)
def test_shard_map_with_and_without_its_check(implementation):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("batch", "heads"))
    kernel_suite.check_sharded(mesh, "float32", 1e-5, implementation)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", AT_ONCE)
def test_strict_settings_and_64_bits(implementation, dtype):
    kernel_suite.check_settings(dtype, implementation)


@pytest.mark.slow
def test_length_16384_trains_in_two_gibibytes():
    run = subprocess.run(
        [sys.executable, "-m", "tests.memory_program", "16384", "sharp"],
        cwd=pathlib.Path(__file__).parents[1],
        # Compiling counts, too, and it is compiled as for a user.
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0", "XLA_FLAGS": ""},
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(run.stdout)["gibibytes"] < 2.0


def _bad(**changes):
    args = oracle.inputs(oracle.Case("bad", documents=(20,)))
    return args | changes


BAD_CALLS = {
    "query.shape": _bad(query=np.zeros((2, 40, 16), np.float32)),
    "query.dtype": _bad(query=np.zeros((2, 40, 2, 16), np.int32)),
    "key.dtype": _bad(key=np.zeros((2, 40, 2, 16), np.float16)),
    "key.shape": _bad(key=np.zeros((2, 40, 2, 8), np.float32)),
    "value.shape": _bad(value=np.zeros((2, 39, 2, 16), np.float32)),
    "key length": _bad(
        query=np.zeros((2, 10, 2, 16), np.float32),
    ),
    "distance_bias.shape": _bad(distance_bias=np.zeros((3, 16), np.float32)),
    "distance_bias.dtype": _bad(distance_bias=np.zeros((2, 16), np.int32)),
    "distance_slope": _bad(distance_bias=None, distance_slope=np.zeros(2, np.float32)),
    "offset.shape": _bad(offset=np.zeros(1, np.float32)),
    "segment_ids.shape": _bad(segment_ids=np.zeros((2, 39), np.int32)),
    "segment_ids.dtype": _bad(segment_ids=np.zeros((2, 40), np.float32)),
    "key length is 39, but it must be at least": _bad(
        query_start=np.zeros(2, np.int32),
        **{name: np.zeros((2, 39, 2, 16), np.float32) for name in ("key", "value")},
        segment_ids=None,
    ),
    "query_start.shape": _bad(query_start=np.zeros(3, np.int32)),
    "offset_divisor": _bad(offset_divisor=-1.0),
    "offset_divisor.shape": _bad(offset_divisor=np.ones((2, 39), np.float32)),
    "renormalize": _bad(offset=None, renormalize=True),
    "skip_mass": _bad(skip_mass=1.0),
    "skip_mass is 'none'": _bad(skip_mass="none"),
    "offset_divisor is 'seen'": _bad(offset_divisor="seen"),
    "scale": _bad(scale=float("nan")),
    "scale is Array": _bad(scale=jnp.ones(())),
    "window is 0, but it must be None or an integer of at least 1": _bad(window=0),
    "window is -3": _bad(window=-3),
    "window is True": _bad(window=True),
    "window is 2.0": _bad(window=2.0),
    "window is Array": _bad(window=jnp.ones((), jnp.int32)),
    "value.dtype": _bad(value=np.zeros((2, 40, 2, 16), np.float16)),
    "value.shape is (2, 40, 2, 0)": _bad(value=np.zeros((2, 40, 2, 0), np.float32)),
    "offset.dtype": _bad(offset=np.zeros(2, np.int32)),
    "query_start.dtype": _bad(query_start=np.zeros(2, np.float32)),
    "implementation": _bad(implementation="cuda"),
    "return_weights": _bad(return_weights=True, implementation="xla_chunked"),
    "query_start is given": _bad(query_start=np.zeros(2, np.int32), implementation="xla_chunked"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_by_name(name):
    with pytest.raises(InputError) as error:
        lazy_attention(**BAD_CALLS[name])
    message = str(error.value)
    assert name in message
    assert message.endswith(".") and "\n" not in message
