"""Primitives that return their argument: they cost nothing, and know when JAX does something.

What JAX does with a call, such as differentiating or lowering it, happens later than the call.
"""

from typing import Any

from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

# For policies of `jax.checkpoint`: what these return need not be saved.
NAMES: set[str] = set()


def identity(kind: str) -> Primitive:
    """Returns a new one, without a derivative; it is bound to an array and a `name`."""
    primitive = Primitive(f"lazy_attention_{kind}")
    NAMES.add(primitive.name)
    primitive.def_impl(lambda x, name: x)
    primitive.def_abstract_eval(lambda x, name: x)
    mlir.register_lowering(primitive, lambda context, x, name: [x])

    def batch(arrays: Any, axes: Any, name: str) -> tuple[Any, Any]:
        return primitive.bind(arrays[0], name=name), axes[0]

    batching.primitive_batchers[primitive] = batch
    return primitive
