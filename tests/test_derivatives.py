"""Derivatives beyond the first, forward mode, symbolic shapes: done, or refused in one sentence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from lazyattn import InputError, lazy_attention
from tests import oracle
from tests.naive import naive_attention

ARGS = oracle.inputs(oracle.Case("small", (1, 20, 2, 1, 4), 8, "alibi", True))
QUERY = jnp.asarray(ARGS["query"])


def _loss(query, implementation=None):
    args = ARGS | {"query": query}
    return jnp.sum(jnp.sin(lazy_attention(**args, implementation=implementation)))


def _linearized(f, x):
    _, tangent = jax.linearize(f, x)
    return tangent(x)


DERIVATIVES = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,))[1],
    "jvp_of_jit": lambda f, x: jax.jvp(jax.jit(f), (x,), (x,))[1],
    "jit_of_jvp": lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x,))[1])(x),
    "linearize": _linearized,
    "jacfwd": lambda f, x: jax.jacfwd(lambda s: f(s * x))(1.0),
    "gradient_of_gradient": lambda f, x: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), x))(x),
    "of_jitted_gradient": lambda f, x: jax.grad(lambda x: jnp.vdot(jax.jit(jax.grad(f))(x), x))(x),
    "jvp_of_gradient": lambda f, x: jax.jvp(jax.grad(f), (x,), (x,))[1],
    "by_a_factor": lambda f, x: jax.grad(
        lambda s: jnp.vdot(jax.grad(lambda x: s * f(x))(x), x)
    )(1.0),
}  # fmt: skip


def _compiled(name):
    """Returns the derivative, most of them as one program: step by step takes seconds."""
    derivative = DERIVATIVES[name]
    return derivative if name in ("jvp", "jacfwd") else jax.jit(derivative, static_argnums=0)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_the_definition_has_all(name):
    assert np.all(np.isfinite(_compiled(name)(lambda x: _loss(x, "xla"), QUERY)))


@pytest.mark.parametrize("name", DERIVATIVES)
def test_others_name_the_definition(name):
    with pytest.raises(InputError) as error:
        jax.block_until_ready(_compiled(name)(_loss, QUERY))
    message = str(error.value)
    assert "'xla_chunked'" in message and 'implementation="xla"' in message
    assert "reverse mode only" in message and "\n" not in message


def test_forward_mode_is_the_slope():
    with jax.enable_x64(True):
        args = {name: np.asarray(x, np.float64) for name, x in ARGS.items()}

        def call(query):
            return lazy_attention(**args | {"query": query}, implementation="xla")

        direction = np.random.default_rng(0).standard_normal(QUERY.shape)
        _, tangent = jax.jit(functools.partial(jax.jvp, call))((args["query"],), (direction,))
        step = 1e-6
        ahead, behind = (
            naive_attention(**args | {"query": args["query"] + sign * step * direction})[0]
            for sign in (1, -1)
        )
    np.testing.assert_allclose(tangent, (ahead - behind) / (2 * step), atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ("rows, length", None),
        ("2, length", 7),
        ("rows, 40", None),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("rows, length", 7), ("2, length", None), ("rows, 40", 7))
        ),
    ],
)
def test_export_with_symbolic_shapes(shape, window):
    args = oracle.inputs(oracle.Case("", (2, 40, 2, 1, 8), 16, "alibi", True, documents=(17, 23)))
    scope = export.SymbolicScope()
    rows, length = shape.split(", ")

    def symbolic(name, x):
        sizes = [str(n) for n in x.shape]
        if x.ndim == 4 or name == "segment_ids":
            sizes[:2] = rows, length
        sizes = export.symbolic_shape(", ".join(sizes), scope=scope)
        return jax.ShapeDtypeStruct(sizes, x.dtype)

    def call(args):
        return lazy_attention(**args, window=window)

    exported = export.export(jax.jit(call))({name: symbolic(name, x) for name, x in args.items()})
    true = jax.jit(lambda: lazy_attention(**args, window=window, implementation="xla"))()
    np.testing.assert_allclose(exported.call(args), true, atol=2e-6)


def test_symbolic_length_asked_for_by_name():
    shape = export.symbolic_shape("1, length, 2, 4")
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def call(x):
        return lazy_attention(x, x, x, implementation="xla_chunked")

    with pytest.raises(InputError, match="length of its arrays are symbolic, unlike with 'xla'"):
        export.export(jax.jit(call))(x)
