"""vmap for kernels that know one batch axis: the mapped axis becomes part of it."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from pallas_kernels.own_settings import traced_by_own_settings
from pallas_kernels.varying import vary_alike

# Called as run(groups, rows, shared), see `over_batch`.
Run = Callable[[int, PyTree, PyTree], PyTree]


def over_batch(run: Run, rows: PyTree, shared: PyTree) -> PyTree:
    """Returns run(1, rows, shared), in a form that can be vmapped.

    Args:
      run: called as run(groups, rows, shared). All arrays of its result have a leading axis
        that is a multiple of `groups`, a number that divides the batch; group g of the
        results depends only on group g of the batch.
      rows: tree of arrays that the batch axis leads.
      shared: tree of arrays without a batch axis.
    """
    leaves, tree = jax.tree.flatten((rows, shared))
    if not leaves:
        return run(1, rows, shared)
    form = None

    def flat(groups: int, *leaves: Array) -> list[Array]:
        nonlocal form
        found, form = jax.tree.flatten(run(groups, *jax.tree.unflatten(tree, leaves)))
        return vary_alike(*found, like=leaves)

    is_shared = [False] * len(jax.tree.leaves(rows)) + [True] * len(jax.tree.leaves(shared))
    found = _over_batch(flat, is_shared, 1)(*leaves)
    # None is no array, and can't be returned through a batching rule.
    return jax.tree.unflatten(form, found)


def _over_batch(
    run: Callable[..., list[Array]], parameters: Sequence[bool], groups: int
) -> Callable[..., list[Array]]:
    """Returns `run` as a function of arrays that can be vmapped.

    Args:
      run: called as run(groups, *arrays).
      parameters: for each array, whether it is shared by the batch.
      groups: how many groups the batch is made of.
    """

    @jax.custom_batching.custom_vmap
    @traced_by_own_settings(narrow=True)
    def call(*arrays: Array) -> list[Array]:
        return run(groups, *arrays)

    @call.def_vmap
    @traced_by_own_settings(narrow=True)
    def _rule(size: int, mapped: Sequence[bool], *arrays: Array) -> tuple[list[Array], list[bool]]:
        if any(is_mapped and shared for is_mapped, shared in zip(mapped, parameters, strict=True)):
            # Parameters differ from one to the next.
            def one(rows: list[Array]) -> list[Array]:
                left = iter(rows)
                return call(*(next(left) if own else x for x, own in each))

            each = list(zip(arrays, mapped, strict=True))
            results = jax.lax.map(one, [x for x, own in each if own])
        else:

            def fold(x: Array, is_mapped: bool, shared: bool) -> Array:
                if shared:
                    return x
                if not is_mapped:
                    x = jnp.broadcast_to(x, (size, *x.shape))
                return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

            rows = map(fold, arrays, mapped, parameters)
            folded = _over_batch(run, parameters, size * groups)(*rows)
            results = [x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in folded]
        return results, [True] * len(results)

    return call
