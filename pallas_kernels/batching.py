"""vmap for kernels that know one batch axis: the mapped axis becomes part of it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.own_settings import traced_by_own_settings


def over_batch(
    run: Callable[..., Any], parameters: Sequence[bool], groups: int = 1
) -> Callable[..., Any]:
    """Returns `run` as a function of arrays that can be vmapped.

    Args:
      run: called as run(groups, *arrays). All its results have a leading axis that is a
        multiple of `groups`, a number that divides the batch; group g of the results
        depends only on group g of the batch.
      parameters: for each array, whether it is shared by the batch rather than led by
        the batch axis.
      groups: how many groups the batch is made of.
    """

    @jax.custom_batching.custom_vmap
    @traced_by_own_settings(narrow=True)
    def call(*arrays: Array) -> Any:
        return run(groups, *arrays)

    @call.def_vmap
    @traced_by_own_settings(narrow=True)
    def _rule(size: int, mapped: Sequence[bool], *arrays: Array) -> tuple[Any, Any]:
        if any(is_mapped and shared for is_mapped, shared in zip(mapped, parameters, strict=True)):
            # Parameters differ from one to the next.
            def one(rows: list[Array]) -> Any:
                left = iter(rows)
                return call(
                    *(
                        next(left) if is_mapped else x
                        for x, is_mapped in zip(arrays, mapped, strict=True)
                    )
                )

            results = jax.lax.map(
                one, [x for x, is_mapped in zip(arrays, mapped, strict=True) if is_mapped]
            )
        else:

            def fold(x: Array, is_mapped: bool, shared: bool) -> Array:
                if shared:
                    return x
                if not is_mapped:
                    x = jnp.broadcast_to(x, (size, *x.shape))
                return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

            folded = over_batch(run, parameters, size * groups)(
                *map(fold, arrays, mapped, parameters)
            )
            results = jax.tree.map(
                lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), folded
            )
        return results, jax.tree.map(lambda _: True, results)

    return call
