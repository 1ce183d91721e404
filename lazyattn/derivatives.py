"""What a fused attention can be differentiated by: once, in reverse mode.

JAX would say so in words about its own machinery, from wherever it notices. So inputs and
outputs pass through an identity that says it in one sentence.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.interpreters import ad, mlir
from jaxtyping import Array

from lazyattn.call import Call
from lazyattn.errors import InputError
from lazyattn.identity import identity

_FLOATS = ("query", "key", "value", "distance_bias", "distance_slope", "offset")


def first_order_reverse_mode(name: str, run: Callable[[Call], Array], call: Call) -> Array:
    """Returns run(call), whose derivatives are those that the implementation has.

    Raises:
      InputError: when it is differentiated otherwise; inside `jax.jit`, when that is compiled.
    """
    given = {x: getattr(call, x) for x in _FLOATS if getattr(call, x) is not None}
    guarded: dict[str, Any] = {x: _guarded.bind(array, name=name) for x, array in given.items()}
    return _guarded.bind(run(dataclasses.replace(call, **guarded)), name=name)


def _refuse(name: str) -> InputError:
    return InputError(
        f"implementation {name!r} of lazy_attention has first derivatives in reverse mode only;"
        ' implementation="xla" has forward mode and higher derivatives.'
    )


# For what goes in and out; for that once it is differentiated; and for its tangents.
_guarded, _once, _tangent = map(identity, ("guarded", "once", "tangent"))


def _guarded_jvp(primals: Any, tangents: Any, name: str) -> tuple[Any, Any]:
    (x,), (tangent,) = primals, tangents
    if not isinstance(tangent, ad.Zero):
        tangent = _tangent.bind(tangent, name=name)
    return _once.bind(x, name=name), tangent


def _once_jvp(primals: Any, tangents: Any, name: str) -> Any:
    raise _refuse(name)


def _not_computed(*args: Any, name: str) -> Any:
    raise _refuse(name)


def _transposed(cotangent: Any, x: Any, name: str) -> list[Any]:
    return [_once.bind(cotangent, name=name)]


ad.primitive_jvps[_guarded] = _guarded_jvp
ad.primitive_jvps[_once] = _once_jvp
# Tangents are transposed in reverse mode, and computed in forward mode.
ad.deflinear2(_tangent, _transposed)
_tangent.def_impl(_not_computed)
mlir.register_lowering(_tangent, _not_computed)
