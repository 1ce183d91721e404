"""Mosaic GPU brings a layout into canonical form once, not each time that an operation names it.

JAX makes a layout anew from MLIR's attribute of each operand and result, thousands of times a
kernel, of some dozens of layouts. That was a tenth of the time in which a call is lowered.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import fragmented_array

_NUMBER = 4096


@functools.cache
def remember() -> None:
    """Has JAX's functions of layouts, which are frozen, remember what they returned."""
    once = functools.lru_cache(_NUMBER)
    _replace("TiledLayout", "canonicalize", once)
    _replace("Tiling", "canonicalize", once)
    _replace("Tiling", "tile_shape", _of_shapes)


def _replace(layout: str, name: str, change: Callable[[Any], Any]) -> None:
    kind = getattr(fragmented_array, layout, None)
    if hasattr(kind, name):
        setattr(kind, name, change(getattr(kind, name)))


def _of_shapes(
    function: Callable[[Any, Sequence[int]], Any],
) -> Callable[[Any, Sequence[int]], Any]:
    """Returns the same for shapes that are lists, too."""
    once = functools.lru_cache(_NUMBER)(function)
    return lambda tiling, shape: once(tiling, tuple(shape))
