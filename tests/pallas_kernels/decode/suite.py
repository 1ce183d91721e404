"""What every backend of `decode_attention` must do, held to the definition in float64.

A case's sequence is put into a cache, and its last few positions are the queries. The truth is
`lazy_attention`'s definition on the whole sequence; for rings, which hold a part of it, the
same formula over the positions that are left.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn import lazy_attention
from lazyattn.decode_attention import PAGE, decode_attention
from pallas_kernels.decode import pages as rule
from pallas_kernels.decode.types import Inputs, Settings
from tests import oracle

# Documents are not for decoding: a row is one.
ORACLE = [case for case in oracle.CASES if case.documents is None]

PARAMETERS = ("distance_bias", "distance_slope", "offset")


@dataclasses.dataclass(frozen=True)
class Decode:
    """How a case's sequence is decoded.

    Attributes:
      case: the sequence, and the attention.
      new: queries of a row.
      shorter: by how much each row is shorter than the one before it.
      slots: of the cache; None: a few more than the sequence is long.
      norms: give the pages' norms, so that pages may be skipped.
    """

    case: oracle.Case
    new: int = 1
    shorter: int = 3
    slots: int | None = None
    norms: bool = True

    def __str__(self) -> str:
        parts = [self.case.name, f"new{self.new}"]
        parts += [f"slots{self.slots}"] if self.slots else []
        return "-".join(parts + ([] if self.norms else ["nonorms"]))

    @property
    def lengths(self) -> np.ndarray:
        batch, length = self.case.shape[:2]
        return np.maximum(length - self.shorter * np.arange(batch), self.new).astype(np.int32)


def by_oracle() -> list[Decode]:
    """Returns the oracle's cases, with one or several queries in turn."""
    decodes = []
    for number, case in enumerate(ORACLE):
        new = min((1, 3, 8)[number % 3], case.shape[1])
        decodes.append(Decode(case, new, norms=number % 4 != 3))
    return decodes


STEEP: dict[str, Any] = {"bias": "alibi", "slope": True}
LONG = oracle.Case("long", (2, 1000, 4, 2, 32), 256, tau=(-1.0, -0.5), **STEEP)
RINGS = [
    Decode(oracle.Case("ring_not_full", (2, 150, 2, 1, 16), 64, tau=(-0.7,), **STEEP), slots=256),
    Decode(oracle.Case("ring", (2, 300, 4, 2, 16), 64, tau=(-0.7, -1), **STEEP), 1, 37, 128),
    Decode(oracle.Case("ring_of_many", (2, 700, 2, 1, 16), 64, **STEEP), 8, 201, 300),
    Decode(oracle.Case("ring_positive", (1, 300, 2, 2, 16), 32, tau=(0.5,)), 3, 0, 150),
    Decode(oracle.Case("ring_softmax", (2, 300, 2, 1, 16), 64, tau=None), 2, 50, 256),
    Decode(
        oracle.Case("ring_window", (1, 500, 2, 1, 16), 64, settings=(("window", 200),)), 4, 0, 203
    ),
]
SPARSE = [
    Decode(LONG),
    Decode(LONG, 4, 300),
    Decode(dataclasses.replace(LONG, name="long_softmax", tau=None), 2),
    Decode(dataclasses.replace(LONG, name="long_positive", tau=(0.5, -0.5)), 2),
    Decode(dataclasses.replace(LONG, name="long_rising", bias="bumpy", width=1000, slope=False)),
    Decode(dataclasses.replace(LONG, name="long_gaps", bias="gaps"), 5),
    Decode(
        dataclasses.replace(
            LONG, name="long_renormalized", tau=(-1.0,), settings=(("renormalize", True),)
        )
    ),
]

EVERY = [*by_oracle(), *RINGS, *SPARSE]

# What runs by default; the rest is slow, since each case is compiled.
QUICK = {
    "paper", "learned_tau_of_both_signs", "plain_softmax", "multi_query", "one_token", "gaps",
    "window_in_documents", "window_of_softmax", "ring", "ring_of_many", "ring_positive",
    "long", "long_renormalized",
}  # fmt: skip


# Softmax is decoded by default, and so are groups and int8; not all at once.
SLOW_CHECKS = {"groups_softmax", "int8_softmax"}


def checks() -> list[Any]:
    """Returns the names of `CHECKS`, some of them marked as slow."""
    return [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW_CHECKS else name
        for name in CHECKS
    ]


def marked(decodes: list[Decode]) -> list[Any]:
    """Returns the cases with all but `QUICK` marked as slow."""
    return [
        decode if decode.case.name in QUICK else pytest.param(decode, marks=pytest.mark.slow)
        for decode in decodes
    ]


@functools.cache
def arrays(decode: Decode, seed: int = 0) -> tuple[dict[str, Any], np.ndarray]:
    """Returns the arguments of `decode_attention` in float32, and the true output."""
    args = oracle.inputs(decode.case, seed)
    batch, length, heads, kv_heads, head_dim = decode.case.shape
    slots = decode.slots or length + 5
    lengths = decode.lengths
    # What is not held must not matter.
    caches = {name: np.full((batch, slots, kv_heads, head_dim), np.nan, "f4") for name in "kv"}
    query = np.zeros((batch, decode.new, heads, head_dim), "f4")
    for row, end in enumerate(lengths):
        held = np.arange(max(0, end - slots), end)
        caches["k"][row, held % slots] = args["key"][row, held]
        caches["v"][row, held % slots] = args["value"][row, held]
        query[row] = args["query"][row, end - decode.new : end]
    given = {
        name: x for name, x in args.items() if name not in ("query", "key", "value", "segment_ids")
    }
    given |= {"key_norms": page_norms(caches["k"])} if decode.norms else {}
    given |= {"ring": bool(slots < length)}
    call = {
        "query": query, "key_cache": caches["k"], "value_cache": caches["v"], "lengths": lengths,
    }  # fmt: skip
    return call | given, truth(decode, args)


def page_norms(keys: np.ndarray) -> np.ndarray:
    """Returns the largest norm of each page's keys, [batch, kv_heads, pages]."""
    norms = np.nan_to_num(np.linalg.norm(keys, axis=-1))
    norms = np.pad(norms, ((0, 0), (0, -norms.shape[1] % PAGE), (0, 0)))
    pages = norms.reshape(norms.shape[0], -1, PAGE, norms.shape[2]).max(axis=2)
    return pages.transpose(0, 2, 1).astype(np.float32)


def truth(decode: Decode, args: dict[str, Any]) -> np.ndarray:
    """Returns the output in float64: by the oracle's definition, where the cache holds all."""
    slots = decode.slots or decode.case.shape[1]
    out = by_definition(decode, args)
    for row, end in enumerate(decode.lengths):
        if end > slots:
            out[row] = on_ring(decode, args, row, end)
    return out


def by_definition(decode: Decode, args: dict[str, Any]) -> np.ndarray:
    """Returns the output of `lazy_attention`'s definition."""
    start = decode.lengths - decode.new
    with jax.enable_x64(True):
        exact = {
            name: np.asarray(x, np.float64) if getattr(x, "dtype", None) == np.float32 else x
            for name, x in args.items()
        }
        rows = np.arange(len(start))[:, None]
        exact["query"] = exact["query"][rows, start[:, None] + np.arange(decode.new)]
        arrays_ = {name: x for name, x in exact.items() if isinstance(x, np.ndarray)}
        static = {name: x for name, x in exact.items() if name not in arrays_}

        @jax.jit
        def call(arrays_, start):
            return lazy_attention(**arrays_, **static, query_start=start, implementation="xla")

        return np.array(call(arrays_, start))


def on_ring(decode: Decode, args: dict[str, Any], row: int, end: int) -> np.ndarray:
    """The same of a row, over the positions that a ring still holds; one query at a time."""
    heads, kv_heads, head_dim = decode.case.shape[2:]
    assert decode.slots is not None
    window = args.get("window")
    out = np.zeros((decode.new, heads, head_dim))
    for i in range(decode.new):
        t = end - decode.new + i
        first = max(0, end - decode.slots, 0 if window is None else t - window + 1)
        j = np.arange(first, t + 1)
        n = t + 1 if window is None else min(t + 1, window)
        for h in range(heads):
            key, value = (
                args[x][row, j, h * kv_heads // heads].astype(np.float64) for x in ("key", "value")
            )
            s = key @ args["query"][row, t, h].astype(np.float64) * head_dim**-0.5
            if "distance_bias" in args:
                table = args["distance_bias"][h].astype(np.float64)
                past = t - j - (len(table) - 1)
                slope = args.get("distance_slope")
                tail = np.zeros(len(j)) if slope is None else table[-1] - slope[h] * past
                s += np.where(past <= 0, table[np.minimum(t - j, len(table) - 1)], tail)
            p = np.exp(s - s.max())
            p /= p.sum()
            if "offset" in args:
                p = np.maximum(0, p + args["offset"][h].astype(np.float64) / n)
            out[i, h] = p @ value
    return out


def run(args: dict[str, Any], implementation: str | None) -> np.ndarray:
    """Returns the output of a compiled call as float64."""
    static = {name: args[name] for name in args if not isinstance(args[name], np.ndarray)}
    given = {name: x for name, x in args.items() if name not in static}

    @jax.jit
    def call(given):
        return decode_attention(**given, **static, implementation=implementation)

    return np.asarray(call(given).astype(jnp.float32), np.float64)


def check(implementation: str, decode: Decode, tolerance: float = 1e-5) -> None:
    """Holds float32 output to the truth."""
    args, true = arrays(decode)
    error = oracle.relative_error(run(args, implementation), true)
    assert error <= tolerance, error


def check_half(implementation: str, decode: Decode, dtype: str, tolerance: float) -> None:
    """Holds output in half precision to the truth for the same rounded numbers."""
    args, _ = arrays(decode)
    source = oracle.inputs(decode.case)
    for name in ("query", "key", "value"):
        source[name] = np.asarray(jnp.asarray(source[name], dtype).astype(jnp.float32))
    true = truth(decode, source)
    half = {name: jnp.asarray(args[name], dtype) for name in ("query", "key_cache", "value_cache")}
    error = oracle.relative_error(run(args | jax.tree.map(np.asarray, half), implementation), true)
    assert error <= tolerance, error


def quantized(cache: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns int8 numbers, scales [batch, kv_heads, pages], and what they stand for."""
    batch, slots, kv_heads, head_dim = cache.shape
    padded = np.pad(np.nan_to_num(cache), ((0, 0), (0, -slots % PAGE), (0, 0), (0, 0)))
    pages = padded.reshape(batch, -1, PAGE, kv_heads, head_dim)
    scales = np.maximum(np.abs(pages).max(axis=(2, 4)) / 127, 1e-9).astype(np.float32)
    numbers = np.rint(pages / scales[:, :, None, :, None]).astype(np.int8)
    real = (numbers * scales[:, :, None, :, None]).reshape(padded.shape)[:, :slots]
    numbers = numbers.reshape(padded.shape)[:, :slots]
    return numbers, scales.transpose(0, 2, 1), real.astype(np.float32)


def check_int8(implementation: str, decode: Decode, tolerance: float = 1e-5) -> None:
    """Holds int8 caches to the float32 caches of the numbers that they stand for."""
    args, _ = arrays(decode)
    keys, key_scales, real_keys = quantized(args["key_cache"])
    values, value_scales, real_values = quantized(args["value_cache"])
    norms = {"key_norms": page_norms(real_keys)} if "key_norms" in args else {}
    real = args | {"key_cache": real_keys, "value_cache": real_values} | norms
    small = real | {"key_cache": keys, "value_cache": values}
    small |= {"key_scales": key_scales, "value_scales": value_scales}
    true = run(real, "xla")
    error = oracle.relative_error(run(small, implementation), true)
    assert error <= tolerance, error


def check_layers(implementation: str, decode: Decode) -> None:
    """A layer of caches of several is read as the cache alone."""
    args, _ = arrays(decode)
    alone = run(args, implementation)
    cached = [name for name in args if name in ("key_cache", "value_cache", "key_norms")]

    @jax.jit
    def call(stacked, rest, layer):
        settings = {name: x for name, x in args.items() if not isinstance(x, np.ndarray)}
        return decode_attention(
            **stacked, **rest, **settings, layer=layer, implementation=implementation
        )

    stacked = {name: np.stack([np.full_like(args[name], 7), args[name]]) for name in cached}
    arrays_ = {name: x for name, x in args.items() if isinstance(x, np.ndarray)}
    rest = {name: x for name, x in arrays_.items() if name not in cached}
    np.testing.assert_array_equal(np.asarray(call(stacked, rest, 1), np.float64), alone)


def check_rows_that_do_not_exist(implementation: str) -> None:
    """Idle rows give 0; a row with fewer positions than queries gives 0 for those before it."""
    decode = Decode(oracle.Case("", (3, 40, 2, 1, 16), 16), new=3)
    args, _ = arrays(decode)
    args = args | {"lengths": np.array([0, 2, 34], np.int32)}
    out = run(args, implementation)
    assert np.all(out[0] == 0) and np.all(out[1, 0] == 0)
    assert np.isfinite(out).all() and np.any(out[2] != 0)
    first = run({**args, "query": args["query"][:, 1:]}, implementation)
    np.testing.assert_allclose(out[1, 1:], first[1], rtol=1e-5, atol=1e-6)
    # Rows that are longer than their cache, unless it is a ring.
    caches = {name: np.nan_to_num(args[name]) for name in ("key_cache", "value_cache")}
    out = run(args | caches | {"lengths": np.array([45, 46, 47], np.int32)}, implementation)
    assert np.isfinite(out[0]).all() and np.isnan(out[1:]).all()


def check_not_a_number_comes_through(implementation: str) -> None:
    """A key that is no number, far or near, alone on its page or not, reaches the output."""
    args, _ = arrays(SPARSE[0])
    for row, slot in ((0, 990), (1, 3), (0, 500)):
        keys = args["key_cache"].copy()
        keys[row, slot, 0] = np.nan
        norms = args["key_norms"].copy()
        norms[row, 0, slot // PAGE] = np.nan
        out = run(args | {"key_cache": keys, "key_norms": norms}, implementation)
        assert np.isnan(out[row, :, :2]).all(), (row, slot)
        assert np.isfinite(out[row, :, 2:]).all() and np.isfinite(out[1 - row]).all()


def check_blind(implementation: str) -> None:
    """A query none of whose keys has mass is no number, as by the definition."""
    args, _ = arrays(Decode(oracle.Case("", (2, 5, 2, 1, 16), 16, "blind")))
    table = np.full_like(args["distance_bias"], -np.inf)
    out = run(args | {"distance_bias": table}, implementation)
    assert np.isnan(out).all()


def inputs_of(args: dict[str, Any]) -> Inputs:
    """Returns what backends get of the arguments of `decode_attention`."""
    return Inputs(
        args["query"],
        **{name: args[f"{name}_cache"][None] for name in ("key", "value")},
        key_norms=args["key_norms"][None],
        key_scales=None,
        value_scales=None,
        layer=jnp.int32(0),
        **{name: args.get(name) for name in ("lengths", *PARAMETERS)},
    )


def settings_of(args: dict[str, Any], skip_mass: float = 1e-6) -> Settings:
    """The same of its settings."""
    window = args.get("window")
    return Settings(args["query"].shape[-1] ** -0.5, skip_mass, window, None, False, False)


def check_unread_pages_do_not_matter(
    implementation: str, decode: Decode, pages: int, rows_together: bool
) -> None:
    """Fills what need not be read with what is no number.

    Args:
      implementation: to check.
      decode: a case with norms and an offset.
      pages: at once, that the implementation reads or leaves out.
      rows_together: it leaves out only what no row needs.
    """
    args, true = arrays(decode)
    batch, slots, kv_heads, _ = args["key_cache"].shape
    visited = jax.jit(rule.visited, static_argnums=1)(inputs_of(args), settings_of(args))
    visited = np.asarray(visited)
    keys, values = args["key_cache"].copy(), args["value_cache"].copy()
    weights = live_slots(decode)
    if rows_together:
        visited, weights = (np.broadcast_to(x.any(axis=0), x.shape) for x in (visited, weights))
    size = pages * PAGE
    unread = dead = 0
    for row, head, start in np.ndindex(batch, kv_heads, -(-slots // size)):
        part = slice(start * size, (start + 1) * size)
        if not visited[row, head, start * pages : (start + 1) * pages].any():
            keys[row, part, head] = np.nan
            unread += 1
        if not weights[row, head, part].any():
            values[row, part, head] = np.nan
            dead += 1
    assert unread and dead >= unread, (unread, dead)
    out = run(args | {"key_cache": keys, "value_cache": values}, implementation)
    assert oracle.relative_error(out, true) <= 1e-5


def live_slots(decode: Decode) -> np.ndarray:
    """Returns which slots have a weight of some query, [batch, kv_heads, slots]."""
    args, _ = arrays(decode)
    batch, slots, kv_heads, _ = args["key_cache"].shape
    source = oracle.inputs(decode.case)
    start = decode.lengths - decode.new
    rows = np.arange(batch)[:, None]
    source["query"] = source["query"][rows, start[:, None] + np.arange(decode.new)]

    @jax.jit
    def weights_of():
        return lazy_attention(
            **source, query_start=start, implementation="xla", return_weights=True
        )[1]

    weights = weights_of()
    live = np.asarray(weights > 0).reshape(batch, kv_heads, -1, weights.shape[-1]).any(axis=2)
    return np.pad(live, ((0, 0), (0, 0), (0, slots - live.shape[-1])))


def check_groups(implementation: str, tau: float | None = -0.7) -> None:
    """Heads that hold unequally many keys, in one call: as each group in a call of its own."""
    groups, windows = ((3, 0), (1,), (4, 2)), (None, 200, None)
    case = oracle.Case("", (2, 700, 10, 5, 16), 64, tau=None if tau is None else (tau,), **STEEP)
    whole = Decode(case, 3, 150)
    parts = [dataclasses.replace(whole, slots=slots) for slots in (130, 384, 705)]
    cached = ("key_cache", "value_cache", "key_norms")
    several: dict[str, list[Any]] = {name: [] for name in cached}
    shared = {k: x for k, x in arrays(whole)[0].items() if k not in (*cached, "ring")}
    true = np.zeros(shared["query"].shape)
    for heads, window, part in zip(groups, windows, parts, strict=True):
        args, _ = arrays(part)
        mine = {
            name: args[name][:, list(heads)] if name == "key_norms" else args[name][:, :, heads]
            for name in cached
        }
        for name in cached:
            several[name].append(mine[name])
        readers = [2 * head + i for head in heads for i in range(2)]
        mine |= {name: shared[name][readers] for name in PARAMETERS if name in shared}
        mine |= {"query": shared["query"][:, :, readers], "lengths": shared["lengths"]}
        true[:, :, readers] = run(mine | {"ring": True, "window": window}, "xla")

    @jax.jit
    def call(shared, several):
        return decode_attention(
            **shared, **several, head_groups=groups, window=windows, ring=True,
            implementation=implementation,
        )  # fmt: skip

    assert oracle.relative_error(np.asarray(call(shared, several), np.float64), true) <= 1e-5


# What every backend is checked for besides its output.
CHECKS: dict[str, Callable[[str], None]] = {
    "half": lambda backend: check_half(backend, SPARSE[1], "bfloat16", 2**-8),
    "int8": lambda backend: check_int8(backend, SPARSE[1]),
    "int8_ring": lambda backend: check_int8(backend, RINGS[2]),
    "int8_softmax": lambda backend: check_int8(backend, SPARSE[2]),
    "layers": lambda backend: check_layers(backend, SPARSE[1]),
    "groups": check_groups,
    "groups_softmax": lambda backend: check_groups(backend, None),
    "rows": check_rows_that_do_not_exist,
    "not_a_number": check_not_a_number_comes_through,
    "blind": check_blind,
}
