"""What varies over a mesh, for kernels inside `jax.shard_map`."""

from collections.abc import Hashable, Sequence

import jax
from jaxtyping import Array


def vary_alike(*arrays: Array, like: Sequence[Array] = ()) -> list[Array]:
    """Makes arrays differ over the same mesh axes, inside `jax.shard_map`.

    A kernel's outputs differ wherever some input does, which JAX can't know. And where
    parameters are the same on all shards, the gradients that the backward pass gives them
    are not: this function's transpose sums them.
    """
    axes: set[Hashable] = set()
    for array in (*arrays, *like):
        axes |= _mesh_axes(array)

    def vary(array: Array) -> Array:
        missing = tuple(axes - _mesh_axes(array))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return [vary(array) for array in arrays]


def _mesh_axes(array: Array) -> set[Hashable]:
    return set(jax.typeof(array).manual_axis_type.varying)
