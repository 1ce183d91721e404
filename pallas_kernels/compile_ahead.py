"""Kernels are compiled side by side, on threads, while the program around them is not done yet.

XLA comes to kernels at its very end, and compiles one after the other then. But no kernel is
compiled twice in a process. So each is compiled before, as a program with nothing else. JAX's
compilation cache keeps such programs, too.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

_THREADS = 4
_begun: set[Hashable] = set()


def begin(
    key: Hashable, kernel: Callable[..., Any], arguments: Sequence[Any], device: jax.Device
) -> None:
    """Begins to compile a kernel, unless that was begun before.

    Args:
      key: what tells kernels apart.
      kernel: a function that calls it.
      arguments: have the shapes and dtypes of its arguments.
      device: what to compile for.
    """
    # Processes of one program must compile the same; a single core has other work.
    if key in _begun or jax.process_count() > 1 or (os.cpu_count() or 1) < 2:
        return
    _begun.add(key)
    on = SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on) for x in arguments]
    _pool().submit(_compile, kernel, shapes)


def _compile(kernel: Callable[..., Any], arguments: list[jax.ShapeDtypeStruct]) -> None:
    jax.jit(kernel).lower(*arguments).compile()


@functools.cache
def _pool() -> concurrent.futures.Executor:
    return concurrent.futures.ThreadPoolExecutor(_THREADS, "compile_ahead")
