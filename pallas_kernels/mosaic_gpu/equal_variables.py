"""Layout inference finds variables that are equal without printing the kernel for each of them.

JAX sorts them by their text, so that it goes by no order of a set. MLIR numbers a whole kernel to
print one operation of it, which was a sixth of the time in which a training step is lowered. Here
variables stay in the order of the constraints, which is as certain.
"""

import functools
from typing import Any

from jax.experimental.mosaic.gpu import constraints

by_jax = getattr(constraints, "compute_transitively_equal_vars", None)


@functools.cache
def keep_order() -> None:
    """Replaces JAX's function, if there is one."""
    if by_jax is not None:
        constraints.compute_transitively_equal_vars = equal_variables


def equal_variables(system: Any) -> dict[Any, list[Any]]:
    """Returns for each variable of an equality of two the others that it must be equal to."""
    # Variables that are known to be equal share one list.
    together: dict[Any, list[Any]] = {}
    for each in system.constraints:
        match each:
            case constraints.Equals(
                lhs=constraints.Variable() as x, rhs=constraints.Variable() as y
            ):
                into, other = (together.setdefault(v, [v]) for v in (x, y))
                if into is not other:
                    into += other
                    together |= dict.fromkeys(other, into)
    return {v: [x for x in equal if x != v] for v, equal in together.items()}
