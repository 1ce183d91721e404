"""JAX's settings, as they are while the op is traced, whatever a user has set.

A strict promotion of dtypes or ranks, or 64-bit numbers, are about the user's own program.
Rules of differentiation and batching are traced later than the call, so they need this too.
"""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def own_settings(*, narrow: bool = False) -> Iterator[None]:
    """Sets what the op's code expects.

    Args:
      narrow: numbers have at most 32 bits, as in all fused kernels.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        if narrow:
            stack.enter_context(jax.enable_x64(False))
        yield


# A context manager is a decorator too: its function runs with the settings.
traced_by_own_settings = own_settings
