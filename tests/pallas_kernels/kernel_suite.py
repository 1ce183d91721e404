"""What fused kernels must do, wherever they run: in interpreters and on devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn import lazy_attention
from pallas_kernels import problem
from tests import fuzz_definition, oracle

# Renormalised weights are not supported.
CASES = [case for case in oracle.CASES if "renormalize" not in dict(case.settings)]

# What interpreters run wherever the suite runs: a case for each branch of the kernels. The
# rest is slow there, and runs on devices.
QUICK = {
    "many_tiles",
    "positive_tau_with_steep_bias",
    "no_bias",
    "no_offset",
    "one_token",
    "gaps",
    "window_in_documents",
}


def in_interpreters(cases: list[oracle.Case], quick: set[str] = QUICK) -> list[Any]:
    """Returns the cases with all but `quick` marked as slow."""
    return [
        case if case.name in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases
    ]


HEAD_SIZES = [
    oracle.Case(
        f"head_size_{size}", (1, 150, 2, 1, size), 64, "alibi", True, (-0.7,), documents=(90, 60)
    )
    for size in (32, 64, 96, 128, 256)
]

# Some tiles live, some dead, some negligible; near the table's end and past it.
SPARSE = oracle.Case("sparse", (1, 400, 2, 1, 32), 100, "alibi", True, (-1.0, -0.4))

# Queries that see nothing, for a bias of -inf at so many of the nearest distances.
_FEW = (1, 300, 2, 1, 16)
BLIND = {
    "elastic": (oracle.Case("", _FEW, 64, "alibi", True, (-0.6, 0.4)), 1),
    "softmax": (oracle.Case("", _FEW, 200, "alibi", True, None), 140),
    "packed": (oracle.Case("", _FEW, 64, "alibi", True, (-1.0, 0.5), (150, 7, 143)), 5),
    "packed_softmax": (oracle.Case("", _FEW, 64, "normal", False, None, (150, 7, 143)), 5),
    "window": (
        oracle.Case("", _FEW, 64, "normal", True, (0.5, -0.1), (180, 120), (("window", 90),), 4.0),
        3,
    ),
    "later": (oracle.Case("", _FEW, 64, "alibi", True, (-1.0, 0.5), (150, 97, 53)), 2),
}

# As long as to have all kinds of tiles on a device.
LONG = [
    oracle.Case("long", (1, 2100, 4, 2, 64), 512, "alibi", True, (-1.0, -0.5)),
    oracle.Case("long_dense", (2, 1024, 2, 2, 64), 512),
    oracle.Case("long_softmax", (1, 1500, 2, 2, 64), 512, "alibi", True, None),
    oracle.Case("long_wide", (1, 2048, 2, 2, 128), 1024, "alibi", True),
    oracle.Case(
        "long_packed", (2, 2048, 4, 4, 64), 256, "alibi", True, documents=(700, 90, 1, 1000)
    ),
    oracle.Case("long_positive", (1, 1100, 2, 1, 128), 256, "alibi", True, (0.3, -1.0)),
    # With a window, within which the table ends.
    oracle.Case(
        "long_window", (1, 2100, 4, 2, 64), 256, "alibi", True, (-1.0, -0.5),
        settings=(("window", 600),),
    ),
    oracle.Case(
        "long_window_in_documents", (2, 2048, 2, 2, 128), 512, "alibi", True,
        documents=(700, 90, 1, 1000), settings=(("window", 256),),
    ),
    oracle.Case(
        "long_window_of_softmax", (1, 1500, 4, 2, 64), 512, tau=None,
        settings=(("window", 333),),
    ),
    oracle.Case(
        "long_window_positive", (1, 1100, 2, 1, 64), 128, "alibi", True, (0.3, -1.0),
        settings=(("window", 300),),
    ),
]  # fmt: skip

# Half precision rounds weights before it multiplies values, as every fused attention does,
# and so delta is off by that much; "xla" takes delta from unrounded weights. That shows
# where one weight holds nearly all of its row's mass.
# And the sum of live values is kept in half precision between the passes: that shows in a
# gradient of tau that nearly cancels.
HALF_PRECISION_FACTOR = {"sharp_scores": 3.0, "learned_tau_of_both_signs": 2.2}


# Of these some gradient, or most, is a sum that is 0 but for rounding.
HALF_PRECISION_CASES = [
    case for case in CASES if case.name not in ("table_of_one", "window_of_one")
]


def check_half_precision(case: oracle.Case, dtype: str, implementation: str = "triton") -> None:
    """Holds a case's errors to those of "xla"."""
    factor = HALF_PRECISION_FACTOR.get(case.name, 1.2)
    oracle.check_half_precision(implementation, case, dtype, factor=factor)


def _arrays(case: oracle.Case, dtype: str) -> tuple[dict[str, Any], np.ndarray]:
    args = oracle.inputs(case)
    for name in ("query", "key", "value"):
        args[name] = jnp.asarray(args[name], dtype)
    d_out = np.random.default_rng(1).standard_normal(args["query"].shape)
    return args, np.asarray(jnp.asarray(d_out, dtype))


def check_same_bits_every_time(
    case: oracle.Case, dtype: str, implementation: str = "triton"
) -> None:
    """Runs twice and compares every bit."""
    args, d_out = _arrays(case, dtype)
    one = oracle.out_and_gradients(args, implementation, d_out)
    other = oracle.out_and_gradients(args, implementation, d_out)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def check_same_bits_many_times(
    shape: tuple[int, ...],
    width: int,
    offset: tuple[float, ...] | None,
    implementation: str = "triton",
    calls: int = 20,
) -> None:
    """Runs forward and backward many times, compares on the device, and says what differed."""
    case = oracle.Case("", shape, width, "normal", False, offset)
    args, d_out = _arrays(case, "bfloat16")

    @jax.jit
    def run(args: dict[str, Any], d_out: Any) -> dict[str, Any]:
        attend = functools.partial(lazy_attention, implementation=implementation)
        out, back = jax.vjp(lambda args: attend(**args), args)
        return {"out": out} | back(d_out)[0]

    same = jax.jit(lambda a, b: jax.tree.map(lambda x, y: jnp.all(x == y), a, b))
    first = run(args, d_out)
    differed: dict[str, int] = {}
    for _ in range(calls - 1):
        for name, equal in same(first, run(args, d_out)).items():
            differed[name] = differed.get(name, 0) + (not equal)
    assert not any(differed.values()), (differed, calls)


def check_dead_tiles_do_not_matter(
    case: oracle.Case, dtype: str, tolerance: float, implementation: str = "triton"
) -> None:
    """Compares with every visited tile computed in full."""
    args, d_out = _arrays(case, dtype)
    skipping = oracle.out_and_gradients(args, implementation, d_out)
    with problem.options(skip_dead=False):
        whole = oracle.out_and_gradients(args, implementation, d_out)
    for name in whole:
        error = oracle.relative_error(skipping[name], whole[name])
        assert error <= tolerance, (name, error)


def check_transformations(
    dtype: str,
    tolerance: float,
    batch: int = 3,
    implementation: str = "triton",
    remat: bool = True,
) -> None:
    """vmap, scan and remat, with packed documents, against one call for the whole batch."""
    case = oracle.Case("", (batch, 70, 2, 1, 16), 32, "alibi", True, documents=(50, 20))
    args, _ = _arrays(case, dtype)
    shared = {k: args.pop(k) for k in ("distance_bias", "distance_slope", "offset")}
    arrays = {k: args[k] for k in ("query", "key", "value")}
    ids = args["segment_ids"]

    def loss(shared, arrays, ids):
        out = lazy_attention(**arrays, **shared, segment_ids=ids, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    def one(shared, row):
        arrays, ids = row
        return loss(shared, {k: v[None] for k, v in arrays.items()}, ids[None])

    def by_vmap(shared, arrays):
        return jax.vmap(one, in_axes=(None, 0))(shared, (arrays, ids)).sum()

    def by_vmap_of_parameters(shared, arrays):
        # Every row with parameters of its own.
        copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), shared)
        return jax.vmap(one)(copies, (arrays, ids)).sum()

    def by_scan(shared, arrays):
        def step(total, row):
            again = jax.checkpoint(one) if remat else one
            return total + again(shared, row), None

        return jax.lax.scan(step, 0.0, (arrays, ids))[0]

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    true = jax.jit(gradient)(shared, arrays, ids)
    for form in (by_vmap, by_vmap_of_parameters, by_scan):
        found = jax.jit(jax.value_and_grad(form, argnums=(0, 1)))(shared, arrays)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(true), strict=True):
            error = oracle.relative_error(np.asarray(a, np.float64), np.asarray(b, np.float64))
            assert error <= tolerance, (form.__name__, error)


def check_settings(dtype: str, implementation: str, *, remat: bool = True) -> None:
    """JAX's strictest settings and 64-bit numbers: the same bits, or as good as."""
    case = oracle.Case("", (2, 70, 2, 1, 16), 32, "alibi", True, documents=(50, 20))
    args, _ = _arrays(case, dtype)
    ids = args.pop("segment_ids")

    def loss(args, ids):
        out = lazy_attention(**args, segment_ids=ids, implementation=implementation)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    def by_vmap(args, ids):
        rows = {name: args.pop(name)[:, None] for name in ("query", "key", "value")}
        of_row = jax.checkpoint(lambda rows, ids: loss(rows | args, ids)) if remat else loss
        return jnp.sum(jax.vmap(lambda rows, ids: of_row(args | rows, ids))(rows, ids[:, None]))

    true = jax.jit(jax.value_and_grad(loss))(args, ids)
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.enable_x64(True),
    ):
        for form in (loss, by_vmap):
            # Differentiated after it was traced, as in libraries.
            found = jax.jit(jax.value_and_grad(jax.jit(form)))(dict(args), ids)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(true), strict=True):
                assert a.dtype == b.dtype
                error = oracle.relative_error(np.asarray(a, np.float64), np.asarray(b, np.float64))
                assert error <= (1e-5 if dtype == "float32" else 2**-7), (form.__name__, error)


def check_sharded(
    mesh: jax.sharding.Mesh, dtype: str, tolerance: float, implementation: str = "triton"
) -> None:
    """Batch and heads shared out over a mesh ("batch", "heads") with shard_map."""
    batch, heads = mesh.devices.shape
    case = oracle.Case("", (2 * batch, 40, 2 * heads, heads, 16), 16, "alibi", True)
    args, _ = _arrays(case, dtype)
    spec = jax.sharding.PartitionSpec
    rows, by_head = spec("batch", None, "heads"), spec("heads")
    specs = {name: rows if x.ndim == 4 else by_head for name, x in args.items()}

    def call(args):
        return lazy_attention(**args, implementation=implementation)

    def loss(call, args):
        return jnp.sum(call(args).astype(jnp.float32) ** 2)

    true = jax.jit(jax.value_and_grad(lambda args: loss(call, args)))(args)
    for check_vma in (True, False):
        sharded = jax.shard_map(
            call, mesh=mesh, in_specs=(specs,), out_specs=rows, check_vma=check_vma
        )
        found = jax.jit(jax.value_and_grad(lambda args, f=sharded: loss(f, args)))(args)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(true), strict=True):
            error = oracle.relative_error(np.asarray(a, np.float64), np.asarray(b, np.float64))
            assert error <= tolerance, (check_vma, error)


def check_not_a_number_comes_through(
    dtype: str, implementation: str = "triton", tile: int = 1
) -> None:
    """A NaN in a key reaches the queries that see it and no others; one in a value, too.

    (It may reach earlier queries of its tile of keys: 0 times NaN is NaN, and so is NaN less a
    large number. With values all kernels are like that; with keys `tile` says how large.)
    """
    args, _ = _arrays(dataclasses.replace(SPARSE, shape=(1, 200, 2, 1, 32)), dtype)

    def out_with(name):
        broken = args | {name: args[name].at[0, 150, 0, 3].set(jnp.nan)}
        out = lazy_attention(**broken, implementation=implementation)
        return np.asarray(out.astype(jnp.float32))

    out = out_with("key")
    assert np.all(np.isfinite(out[0, : 150 // tile * tile]))
    assert np.all(np.isnan(out[0, 150:154]))
    assert np.any(np.isnan(out_with("value")[0, 150:154]))


def check_gradients_of_blind_rows(
    dtype: str,
    tolerance: float,
    implementation: str = "triton",
    names: tuple[str, ...] = tuple(BLIND),
    head_dim: int = 16,
) -> None:
    """A query that sees nothing is NaN, and has no part in any gradient; its own is 0.

    So it is in float64, where such rows have no weights; a finite cotangent of theirs is nothing.
    """
    for name in names:
        case, blind = BLIND[name]
        case = dataclasses.replace(case, shape=(*case.shape[:-1], head_dim))
        args, d_out = _arrays(case, dtype)
        args["distance_bias"][:, :blind] = -np.inf
        if name == "later":
            start = case.shape[1] - 100
            args |= {"query": args["query"][:, start:], "chunk_starts": np.array([start])}
            d_out = d_out[:, start:]
        exact = {n: np.asarray(x) for n, x in args.items() if np.ndim(x)}
        unit = 2.0**-8 if dtype == "bfloat16" else 2.0**-23
        true = fuzz_definition.truth(args | exact, d_out, unit)
        d_out = np.where(true.unsure[..., None], 0, d_out).astype(d_out.dtype)
        found = oracle.out_and_gradients(args, implementation, d_out)
        assert true.blind.any() and np.all(np.isnan(found["out"][true.blind])), name
        found["out"][true.blind] = true.results["out"][true.blind] = 0
        for result, x in true.results.items():
            error = oracle.relative_error(found[result], x)
            assert error <= tolerance, (name, result, error)


def check_a_far_key_that_is_none_comes_through(dtype: str, implementation: str) -> None:
    """A NaN in a key reaches the last query, though the tiles between are negligible."""
    case = oracle.Case("far", (1, 1100, 2, 1, 64), 64, "steep", True)
    args, _ = _arrays(case, dtype)
    args["key"] = args["key"].at[0, 3, 0, 3].set(jnp.nan)
    out = lazy_attention(**args, implementation=implementation)
    assert np.all(np.isnan(np.asarray(out.astype(jnp.float32))[0, -1]).any(axis=-1))
