"""Types of what a kernel's body handles."""

from typing import Any

from jaxtyping import Array, Int, PyTree

# A reference to memory, or a part of it by `at`. JAX has no public type for both.
Ref = Any
# By the names of operands, results and scratch.
Refs = dict[str, Ref]
# The types of SMEM buffers and barriers, by name. JAX's types for them have no common base.
Scratch = dict[str, Any]
# What goes around a loop: any tree of arrays.
Carry = PyTree

# A number that is known when the kernel runs; and one that may be known before.
Scalar = Int[Array, ""]
Index = Scalar | int
# How many tiles of its two pipelines of tiles a CTA has consumed before a work tile.
TilesConsumed = tuple[Scalar, Scalar]
