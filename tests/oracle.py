"""The one parametrised suite that every implementation of the op runs.

`CASES` names the situations, `inputs` makes their arrays, and `check` holds an
implementation's output and all its gradients to the definition in float64.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyattn import lazy_attention


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of the op.

    Attributes:
      name: what the test is called.
      shape: (batch, length, heads, kv_heads, head_dim).
      width: entries of the bias table; 0: no bias.
      bias: "normal", "alibi", "bumpy" (large, not monotone), "steep", "gaps" (-inf at some
        distances, the tail's among them) or "blind" (-inf at the nearest two).
      slope: give the tail a slope.
      tau: offset of the heads, dealt out in turn; None: no offset.
      documents: lengths of packed documents, cycled; None: one document.
      settings: further keyword arguments of the op.
      score_scale: factor of queries and keys, for sharp scores.
      sink: logits of the heads' sinks, dealt out in turn; None: no sink.
      prefix: "first", half of the row, or "some" keys; None: causal.
    """

    name: str
    shape: tuple[int, int, int, int, int] = (2, 40, 2, 2, 16)
    width: int = 16
    bias: str = "normal"
    slope: bool = False
    tau: tuple[float, ...] | None = (-1.0,)
    documents: tuple[int, ...] | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    score_scale: float = 1.0
    sink: tuple[float, ...] | None = None
    prefix: str | None = None

    def __str__(self) -> str:
        return self.name


# Of several tiles. Cases whose shape isn't their subject share one, so that what is compiled
# for the first of them serves the others.
TILES: dict[str, Any] = {"shape": (1, 300, 2, 2, 16), "width": 64}
PACKED: dict[str, Any] = {"shape": (2, 150, 4, 2, 16)}

CASES = [
    Case("paper"),
    Case("sharp", bias="alibi", slope=True, tau=(-0.5,), **TILES),
    Case("several_tiles", bias="alibi", slope=True, **TILES),
    Case("many_tiles", shape=(1, 1100, 2, 1, 16), width=128, bias="steep", slope=True),
    Case("learned_tau_of_both_signs", tau=(-0.7, 0.3), **TILES),
    Case("tau_zero", tau=(0.0,)),
    Case("positive_tau_with_steep_bias", tau=(0.5, 1.0), bias="steep", **TILES),
    Case("table_longer_than_sequence", width=100, bias="bumpy"),
    Case("table_of_one", width=1, slope=True),
    Case("no_tail", bias="bumpy", **TILES),
    Case("bumpy_bias", shape=(1, 300, 2, 2, 16), width=300, bias="bumpy"),
    Case("no_bias", width=0),
    Case("no_offset", tau=None, bias="alibi", slope=True, shape=(2, 150, 2, 2, 16)),
    Case("plain_softmax", tau=None, width=0),
    Case("grouped_query", shape=(2, 70, 6, 2, 16)),
    Case("multi_query", shape=(2, 140, 4, 1, 16), tau=(-0.5, -2.0)),
    Case("documents", documents=(17, 3, 1, 40, 1), **PACKED),
    Case("documents_grouped", documents=(130, 60), bias="alibi", **PACKED),
    Case("one_token_documents", documents=(1,), **PACKED),
    Case("one_token", shape=(2, 1, 2, 2, 16)),
    Case("two_tokens", shape=(1, 2, 2, 1, 16)),
    Case("odd_length", shape=(1, 131, 2, 2, 16)),
    Case("sharp_scores", score_scale=3.0, **TILES),
    Case("constant_offset", settings=(("offset_divisor", 1.0),), tau=(-0.05,)),
    Case("length_offset", settings=(("offset_divisor", 40.0),)),
    Case("renormalized", settings=(("renormalize", True),), shape=(1, 140, 2, 2, 16)),
    Case("own_scale", settings=(("scale", 0.7),)),
    Case(
        "visit_everything", settings=(("skip_mass", 0.0),), bias="steep", shape=(1, 300, 2, 2, 16)
    ),
    Case("everything_dead", tau=(-50.0,)),
    Case("gaps", bias="gaps", shape=(1, 300, 2, 1, 16), width=40, slope=True, tau=(-0.6, 0.4)),
]

# Each query sees the last few keys of its document.
WINDOWED = [
    Case(
        "window",
        shape=(1, 300, 2, 2, 16),
        width=64,
        bias="alibi",
        slope=True,
        settings=(("window", 100),),
    ),
    Case(
        "window_in_documents",
        shape=(2, 210, 4, 2, 16),
        tau=(-0.7, 0.3),
        documents=(110, 17, 3),
        settings=(("window", 40),),
    ),
    Case(
        "window_of_softmax",
        shape=(1, 280, 2, 1, 16),
        width=0,
        tau=None,
        settings=(("window", 129),),
    ),
    Case("window_of_one", shape=(1, 40, 2, 2, 16), tau=(0.5, -0.5), settings=(("window", 1),)),
    Case(
        "window_renormalized",
        shape=(1, 140, 2, 2, 16),
        settings=(("window", 9), ("renormalize", True)),
    ),
]
CASES += WINDOWED

# What "xla" alone does.
_LONG: dict[str, Any] = {"shape": (2, 300, 2, 1, 8), "width": 20, "bias": "bumpy", "slope": True}
DEFINITION_ONLY = [
    Case("sink", sink=(0.5, -1.0), tau=(-0.7, 0.3), shape=(2, 70, 4, 2, 16)),
    Case("sink_of_softmax", sink=(0.0,), tau=None, width=0),
    Case("sink_in_blocks", sink=(2.0, 0.5), documents=(170, 30), **_LONG),
    Case("soft_cap", settings=(("soft_cap", 1.5),), score_scale=2.0, tau=(-0.7,)),
    Case("soft_cap_in_blocks", settings=(("soft_cap", 2.0),), tau=None, **_LONG),
    Case("prefix", prefix="first", bias="bumpy", slope=True),
    Case("prefix_of_documents", prefix="some", documents=(17, 3, 20), tau=(-0.7, 0.3)),
    Case("prefix_and_window", prefix="some", settings=(("window", 5),), documents=(25, 15)),
    Case("prefix_in_blocks", prefix="some", documents=(170, 130), **_LONG),
    Case(
        "all_at_once",
        prefix="first",
        sink=(0.3,),
        settings=(("soft_cap", 3.0), ("renormalize", True)),
        shape=(1, 50, 2, 1, 16),
    ),
]


def inputs(case: Case, seed: int = 0, dtype: Any = np.float32) -> dict[str, Any]:
    """Returns the arguments of the op as numpy arrays."""
    rng = np.random.default_rng(seed)
    batch, length, heads, kv_heads, head_dim = case.shape

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    args: dict[str, Any] = {
        "query": normal(batch, length, heads, head_dim) * dtype(case.score_scale),
        "key": normal(batch, length, kv_heads, head_dim) * dtype(case.score_scale),
        "value": normal(batch, length, kv_heads, head_dim),
    }
    if case.width:
        args["distance_bias"] = make_bias(case.bias, heads, case.width, rng).astype(np.float32)
        if case.slope:
            args["distance_slope"] = (0.02 + 0.3 * rng.random(heads)).astype(np.float32)
    if case.tau is not None:
        args["offset"] = np.resize(np.array(case.tau, np.float32), heads)
    if case.documents is not None:
        args["segment_ids"] = segment_ids(case.documents, batch, length)
    if case.sink is not None:
        args["sink"] = np.resize(np.array(case.sink, np.float32), heads)
    if case.prefix is not None:
        first = np.arange(length) < length // 2
        args["prefix"] = rng.random((batch, length)) < (first if case.prefix == "first" else 0.3)
    return args | dict(case.settings)


def make_bias(kind: str, heads: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a table of the named kind, [heads, width]."""
    x = np.arange(width)
    slope = 2.0 ** (-4 * (np.arange(heads)[:, None] + 1) / heads)
    return {
        "normal": 0.02 * rng.standard_normal((heads, width)),
        "alibi": -slope * x,
        "blind": np.where(x < 2, -np.inf, -slope * x),
        "gaps": np.where((x % 7 == 3) | (x > width - 4), -np.inf, 1 - x / 20) + 0.0 * slope,
        "steep": -0.5 * (1 + np.arange(heads)[:, None]) * x,
        "bumpy": 4 * np.sin(x / 7 + np.arange(heads)[:, None])
        + rng.standard_normal((heads, width)),
    }[kind]


def segment_ids(lengths: tuple[int, ...], batch: int, length: int) -> np.ndarray:
    """Returns packed documents of the cycled lengths, each row starting elsewhere."""
    rows = []
    for row in range(batch):
        turns = np.roll(lengths, row)
        ids = np.repeat(np.arange(1, length + 1), np.resize(turns, length))
        rows.append(ids[:length])
    return np.stack(rows).astype(np.int32)


GRADIENTS = ("query", "key", "value", "distance_bias", "distance_slope", "offset", "sink")


def out_and_gradients(args: dict[str, Any], implementation: str, d_out: Any) -> dict[str, Any]:
    """Returns out and the gradient of every float input, as float64 numpy arrays."""
    arrays = {name: jnp.asarray(args[name]) for name in GRADIENTS if name in args}
    rest = {name: x for name, x in args.items() if name not in arrays}
    masks = {name: rest.pop(name) for name in ("segment_ids", "prefix") if name in rest}
    make = _shared_program if implementation in ("xla", "xla_chunked") else _program
    out, gradients = make(implementation, tuple(rest.items()))(arrays, masks, jnp.asarray(d_out))
    result = {"out": out} | gradients
    return {
        name: np.asarray(x.astype(jnp.float32) if x.dtype.itemsize < 4 else x, np.float64)
        for name, x in result.items()
    }


def _program(implementation: str, settings: tuple[tuple[str, Any], ...]) -> Any:
    """Returns a function of arrays, masks and a cotangent that is compiled by itself."""

    @jax.jit
    def run(arrays, masks, d_out):
        def call(arrays):
            return lazy_attention(
                **arrays, **dict(settings), **masks, implementation=implementation
            )

        out, vjp = jax.vjp(call, arrays)
        return out, vjp(d_out.astype(out.dtype))[0]

    return run


# Kernels are not among those shared: tests change how they are made.
_shared_program = functools.cache(_program)


def relative_error(x: np.ndarray, true: np.ndarray) -> float:
    """Returns |x - true| / |true| in the Euclidean norm."""
    size = np.linalg.norm(true)
    return float(np.linalg.norm(x - true) / (size if size > 1e-6 else 1.0))


@functools.cache
def true_results(case: Case, seed: int = 0) -> tuple[dict[str, Any], np.ndarray, dict[str, Any]]:
    """Returns float32 arguments, a cotangent, and the definition's float64 results."""
    args = inputs(case, seed)
    d_out = np.random.default_rng(seed + 1).standard_normal(args["query"].shape)
    with jax.enable_x64(True):
        exact = {
            name: x.astype(np.float64) if getattr(x, "dtype", None) == np.float32 else x
            for name, x in args.items()
        }
        return args, d_out, out_and_gradients(exact, "xla", d_out)


def check(implementation: str, case: Case, *, tolerance: float = 1e-5, seed: int = 0) -> None:
    """Holds float32 output and gradients to the definition in float64."""
    args, d_out, true = true_results(case, seed)
    found = out_and_gradients(args, implementation, d_out.astype(np.float32))
    errors = {name: relative_error(found[name], true[name]) for name in true}
    worse = {name: error for name, error in errors.items() if not error <= tolerance}
    if worse.keys() <= set(SUMMED):
        # Such a sum of both signs may be near 0 by chance, and then float32 leaves
        # nobody many digits of it.
        plain = {name: float32_errors(case, "xla", seed)[name] for name in worse}
        worse = {name: e for name, e in worse.items() if not e <= 4 * plain[name]}
    assert not worse, errors


def check_blind_rows(
    implementation: str,
    *,
    dtype: Any = "float32",
    tolerance: float = 1e-5,
    length: int = 300,
    head_dim: int = 16,
) -> None:
    """Queries may not look at themselves nor at near keys: numbers but where nothing is left."""
    shape = (1, length, 2, 1, head_dim)
    for case, blind in (
        (Case("", shape, 64, "alibi", True, (-0.6, 0.4)), 1),
        (Case("", shape, 200, "normal", tau=None), 140),
        (Case("", shape, 64, "alibi", True, documents=(150, 7, 143)), 5),
        (Case("", shape, 200, "normal", tau=(0.5, -0.1), score_scale=4.0), 140),
    ):
        args = inputs(case)
        args["distance_bias"][:, :blind] = -np.inf
        for name in ("query", "key", "value"):
            args[name] = np.asarray(jnp.asarray(args[name], dtype))
        with jax.enable_x64(True):
            exact = {
                name: np.asarray(x, np.float64) if name in GRADIENTS else x
                for name, x in args.items()
            }
            true = np.asarray(jax.jit(functools.partial(_call, "xla"))(exact))
        out = jax.jit(functools.partial(_call, implementation))(args).astype(jnp.float32)
        out = np.asarray(out)
        starts = document_places(case)
        sees_nothing = starts < blind
        assert np.all(np.isnan(out[:, sees_nothing])), (case, blind)
        assert np.all(np.isnan(true[:, sees_nothing]))
        error = relative_error(out[:, ~sees_nothing], true[:, ~sees_nothing])
        assert error <= tolerance, (case, blind, error)


def check_gradient_of_an_offset_of_zero(
    implementation: str, *, dtype: Any = "float32", tolerance: float = 1e-5, head_dim: int = 16
) -> None:
    """Where tau is 0, keys with next to no mass have no weight, and count in its gradient."""
    args = inputs(Case("", (1, 700, 2, 1, head_dim), 64, tau=(0.0, -0.3)))
    slope = np.array([0.1, 0.2], np.float32)
    args["distance_bias"] = -slope[:, None] * np.arange(64, dtype=np.float32)
    args["distance_slope"] = slope
    args["value"] = 1 + 0.1 * args["value"]  # of one sign, so that nothing cancels
    d_out = np.ones(args["query"].shape, np.float32)
    for name in ("query", "key", "value"):
        args[name] = np.asarray(jnp.asarray(args[name], dtype))
    found, true = (
        out_and_gradients(args, name, jnp.asarray(d_out, dtype))["offset"]
        for name in (implementation, "xla")
    )
    error = np.abs(found - true)[0] / np.abs(true)[0]
    assert error <= tolerance, (found, true)


def _call(implementation: str, args: dict[str, Any]) -> jax.Array:
    return lazy_attention(**args, implementation=implementation)


def document_places(case: Case) -> np.ndarray:
    """Returns the place of each position of the first row in its document."""
    length = case.shape[1]
    if case.documents is None:
        return np.arange(length)
    return np.concatenate([np.arange(n) for n in np.resize(case.documents, length)])[:length]


# Gradients of few numbers, each a long sum: rounding leaves them less alike than arrays.
SUMMED = ("distance_slope", "offset", "sink")


@functools.cache
def float32_errors(case: Case, implementation: str, seed: int = 0) -> dict[str, float]:
    """Returns relative errors of float32 output and gradients against float64."""
    args, d_out, true = true_results(case, seed)
    found = out_and_gradients(args, implementation, d_out.astype(np.float32))
    return {name: relative_error(found[name], true[name]) for name in true}


@functools.cache
def half_precision_errors(
    case: Case, dtype: str, implementation: str, seed: int = 0
) -> dict[str, float]:
    """Returns relative errors of out and gradients against float64 on the same inputs.

    The inputs are rounded to `dtype` first, so that only the computation's own errors
    count.
    """
    args = inputs(case, seed)
    d_out = np.random.default_rng(seed + 1).standard_normal(args["query"].shape)
    d_out = np.asarray(jnp.asarray(d_out, dtype))
    for name in ("query", "key", "value"):
        args[name] = np.asarray(jnp.asarray(args[name], dtype))
    with jax.enable_x64(True):
        exact = {
            name: np.asarray(x, np.float64) if name in GRADIENTS else x for name, x in args.items()
        }
        true = out_and_gradients(exact, "xla", d_out.astype(np.float64))
    found = out_and_gradients(args, implementation, d_out)
    return {name: relative_error(found[name], true[name]) for name in true}


def check_half_precision(
    implementation: str, case: Case, dtype: str, *, factor: float = 1.2, seed: int = 0
) -> None:
    """Holds errors in half precision to `factor` times those of "xla" in the same dtype.

    And of a part of the dtype's unit more: a fused backward pass takes delta from outputs,
    which come of rounded weights, and rounds weights' gradients for products, where "xla" does
    neither. That shows in small cases, and in sums that nearly cancel.
    """
    ours = half_precision_errors(case, dtype, implementation, seed)
    plain = half_precision_errors(case, dtype, "xla", seed)
    unit = float(jnp.finfo(dtype).eps)
    worse = {
        name: (ours[name], plain[name])
        for name in ours
        if not ours[name] <= factor * (plain[name] + unit * (1.5 if name in SUMMED else 0.4))
    }
    assert not worse, worse
