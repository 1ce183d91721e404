"""What the op does around a backend, seen from a backend that has a part of its own arrays None."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention
from pallas_kernels.problem import Gradients, Inputs, Problem, Residuals
from tests.pallas_kernels.problems import problem


class _Padded(Problem):
    """A plan that wants rows of whole fours, and two numbers a head more."""

    @property
    def padding(self):
        return -self.length % 4, 2


def _double(plan, inputs, table, ranges, *, training):
    assert table is None and inputs.distance_bias is None
    assert inputs.query.shape[1] % 4 == 0 and inputs.query.shape[3] == plan.head_dim + 2
    # What a row of padding sees is what the last row sees.
    last = inputs.segment_start[:, plan.length - 1 :]
    out = 2 * inputs.query + 0 * (last - last[:, :1]).sum()
    return out, Residuals(lse=inputs.query[..., 0]) if training else None


def _backward(plan, inputs, table, ranges, residuals, d_out, groups):
    assert residuals.out is None and residuals.live is None
    ones = jnp.ones((inputs.query.shape[0], 2))
    return Gradients(
        query=2 * d_out,
        key=jnp.zeros_like(inputs.key),
        value=jnp.zeros_like(inputs.value),
        distance_bias=None,
        distance_slope=None,
        offset=ones.reshape(groups, -1, 2).sum(axis=1),
    )


@pytest.fixture
def backend(monkeypatch):
    module = types.SimpleNamespace(
        PLAIN_JAX=False,
        plan=lambda problem, inputs: _Padded(**problem.facts()),
        table=lambda plan, distance_bias, distance_slope, length: None,
        ranges=lambda plan, inputs, table, *, training: None,
        forward=_double,
        backward=_backward,
    )
    monkeypatch.setattr(attention, "backend", lambda name: module)
    return module


def _inputs(batch, length):
    query = jnp.arange(batch * length * 2 * 3, dtype=jnp.float32).reshape(batch, length, 2, 3)
    start = jnp.zeros((batch, length), jnp.int32)
    scale = jnp.ones((batch, length))
    return Inputs(query, query, query, start, scale, None, None, jnp.ones(2))


def _loss(inputs, query, offset):
    arrays = inputs.rows | inputs.parameters | {"query": query, "offset": offset}
    call = problem(length=query.shape[1], head_dim=3, value_dim=3)
    return jnp.sum(attention.attention("mine", call, Inputs(**arrays)) * query)


def test_arrays_are_padded_and_absent_ones_are_none(backend):
    inputs = _inputs(2, 5)
    loss, (d_query, d_offset) = jax.value_and_grad(_loss, argnums=(1, 2))(
        inputs, inputs.query, inputs.offset
    )
    np.testing.assert_allclose(loss, 2 * np.sum(np.square(inputs.query)))
    np.testing.assert_allclose(d_query, 4 * inputs.query)
    np.testing.assert_array_equal(d_offset, [2, 2])


@pytest.mark.parametrize("offset_mapped", [False, True])
def test_vmap_makes_one_batch_with_gradients_apart(backend, offset_mapped):
    inputs = _inputs(6, 5)
    batches = inputs.query.reshape(3, 2, 5, 2, 3)
    part = _inputs(2, 5)
    offset = jnp.ones((3, 2)) if offset_mapped else jnp.ones(2)
    gradient = jax.grad(lambda query, offset: _loss(part, query, offset), argnums=(0, 1))
    found = jax.vmap(gradient, in_axes=(0, 0 if offset_mapped else None))(batches, offset)
    np.testing.assert_allclose(found[0], 4 * batches)
    np.testing.assert_array_equal(found[1], np.full((3, 2), 2))
