"""Types of what a kernel's body handles."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from jaxtyping import Array, Int

# A reference to memory, or a part of it by `at`. JAX has no public type for both.
Ref = Any
# By the names of operands, results and scratch.
Refs = SimpleNamespace
# The types of scratch memory, by name. JAX's types for them have no common base.
Scratch = dict[str, Any]

# A number that is known when the kernel runs; and one that may be known before.
Scalar = Int[Array, ""]
Index = Scalar | int
# Some keys of a tile, that are in memory or not.
Strips = Callable[[slice], Array]
