"""A kernel is the same one however many were lowered before it in the process.

Mosaic GPU names what it dumps by a counter and leaves the name in the kernel's module. So the same
kernel, lowered for a second program, was compiled again, and a program's key in the compilation
cache depended on what else a process had lowered before.
"""

import functools
import os
from typing import Any

from jax.experimental.mosaic.gpu import core
from jax.extend.mlir import ir

_NAME = "mosaic_gpu.dump_basename"


@functools.cache
def make_stable() -> None:
    """Names each kernel's dump after the kernel alone, unless dumps are asked for."""
    serialize = getattr(core, "_run_serde_pass", None)
    if serialize is None or any(name.startswith("MOSAIC_GPU_DUMP") for name in os.environ):
        return

    def with_stable_name(module: ir.Module, **settings: Any) -> ir.Module:
        found = module.operation.attributes
        if _NAME in found and "sym_name" in found:
            with module.context:
                found[_NAME] = ir.StringAttr.get(ir.StringAttr(found["sym_name"]).value)
        return serialize(module, **settings)

    core._run_serde_pass = with_stable_name
