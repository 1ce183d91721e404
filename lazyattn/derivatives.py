"""What a fused attention can be differentiated by: once, in reverse mode.

JAX would say so in words about its own machinery, from wherever it notices. So inputs and
outputs pass through an identity that says it in one sentence.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from lazyattn.call import Call
from lazyattn.errors import InputError

_FLOATS = ("query", "key", "value", "distance_bias", "distance_slope", "offset")


def first_order_reverse_mode(name: str, run: Callable[[Call], Array], call: Call) -> Array:
    """Returns run(call), whose derivatives are those that the implementation has.

    Raises:
      InputError: when it is differentiated otherwise; inside `jax.jit`, when that is compiled.
    """
    guard = _guard(name)
    floats: dict[str, Any] = {
        x: guard(getattr(call, x)) for x in _FLOATS if getattr(call, x) is not None
    }
    return guard(run(dataclasses.replace(call, **floats)))


def _refuse(name: str) -> InputError:
    return InputError(
        f"implementation {name!r} of lazy_attention has first derivatives in reverse mode only;"
        ' implementation="xla" has forward mode and higher derivatives.'
    )


# A linear identity on tangents, which can be transposed but not computed.
_reverse_only = Primitive("lazy_attention_reverse_only")


def _raise(*args: Any, name: str) -> Any:
    raise _refuse(name)


_reverse_only.def_impl(_raise)
_reverse_only.def_abstract_eval(lambda x, name: x)
mlir.register_lowering(_reverse_only, _raise)


def _transpose(cotangent: Any, x: Any, name: str) -> list[Any]:
    return [_once(name)(cotangent)]


ad.deflinear2(_reverse_only, _transpose)


def _batch(arrays: Any, axes: Any, name: str) -> tuple[Any, Any]:
    return _reverse_only.bind(arrays[0], name=name), axes[0]


batching.primitive_batchers[_reverse_only] = _batch


@functools.cache
def _guard(name: str) -> Callable[[Array], Array]:
    @jax.custom_jvp
    def guard(x: Array) -> Array:
        return x

    @guard.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        return _once(name)(primals[0]), _reverse_only.bind(tangents[0], name=name)

    return guard


@functools.cache
def _once(name: str) -> Callable[[Array], Array]:
    """Returns the identity of what can't be differentiated again."""

    @jax.custom_jvp
    def once(x: Array) -> Array:
        return x

    @once.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        raise _refuse(name)

    return once
