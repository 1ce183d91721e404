"""A program's kernels are compiled side by side, while the rest of it is still lowered.

XLA comes to kernels at its very end, and compiles one after the other then: 1 to 3 s each. But it
compiles no kernel twice in a process. So each is compiled as soon as it is lowered, on a thread of
its own, as a program with nothing else. JAX's compilation cache keeps such programs, too.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.mosaic.gpu import core
from jax.extend.mlir import ir
from jax.sharding import SingleDeviceSharding

_THREADS = 4
_begun: set[bytes] = set()


@functools.cache
def switch_on() -> None:
    """Has kernels compiled ahead, where there is a core for it."""
    lower = getattr(core, "_mosaic_gpu_lowering_rule", None)
    if lower is None or (os.cpu_count() or 1) < 2:
        return

    def lower_and_compile(ctx: Any, *args: Any, **params: Any) -> Any:
        results = lower(ctx, *args, **params)
        begin(ctx, results)
        return results

    core._mosaic_gpu_lowering_rule = lower_and_compile


def begin(ctx: Any, results: Any) -> None:
    """Begins to compile a kernel that was lowered to `results`, unless that was begun before."""
    device = _device(ctx)
    if device is None:
        return
    config: Any = ir.DictAttr(results[0].owner.attributes["mhlo.backend_config"])
    attributes = {}
    for each in config:
        attribute = each.attr
        text = isinstance(attribute, ir.StringAttr)
        attributes[each.name] = attribute.value_bytes if text else attribute.value
    if attributes["kernel_hash"] not in _begun:
        _begun.add(attributes["kernel_hash"])
        _pool().submit(_compile, *program(device, ctx.avals_in, ctx.avals_out, attributes))


def program(
    device: jax.Device, arguments: Any, outputs: Any, attributes: dict[str, Any]
) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """Returns a function that is one kernel, and the types of its arguments on the device."""
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs]
    call = jax.ffi.ffi_call("mosaic_gpu_v2", types)
    on = SingleDeviceSharding(device)

    def kernel(*arrays: jax.Array) -> Any:
        return call(*arrays, **attributes)

    return kernel, [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on) for x in arguments]


def _compile(kernel: Callable[..., Any], arguments: list[jax.ShapeDtypeStruct]) -> None:
    jax.jit(kernel).lower(*arguments).compile()


def _device(ctx: Any) -> jax.Device | None:
    """Returns a GPU to compile for; None: there is nothing to compile yet, or not alone."""
    backend = ctx.module_context.backend
    if backend is None or backend.platform not in ("cuda", "gpu") or jax.process_count() > 1:
        return None
    return (backend.local_devices() or backend.devices())[0]


@functools.cache
def _pool() -> concurrent.futures.Executor:
    return concurrent.futures.ThreadPoolExecutor(_THREADS, "compile_ahead")
