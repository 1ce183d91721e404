"""Inputs that the attention benchmarks share."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lazyattn.call import Call
from pallas_kernels.problem import Inputs, Problem

CASES = ("dense", "alibi", "learned", "biased_softmax")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call."""

    batch: int
    heads: int
    length: int
    head_dim: int
    kv_heads: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Reads "4x16x4096x64" (batch, heads, length, head size) or "...x4" (key heads)."""
        sizes = [int(size) for size in text.split("x")]
        return cls(*sizes, *([] if len(sizes) == 5 else [sizes[1]]))

    def __str__(self) -> str:
        text = f"{self.batch}x{self.heads}x{self.length}x{self.head_dim}"
        return text if self.kv_heads == self.heads else f"{text}x{self.kv_heads}"

    def flops(self, backward: bool) -> float:
        """Returns what causal softmax attention needs: half of 2, or of 2 + 5, products."""
        return (7.0 if backward else 2.0) * self.product

    @property
    def product(self) -> float:
        """FLOPs of one causal product of queries and keys."""
        return float(self.batch * self.heads * self.length**2 * self.head_dim)


def tensors(shape: Shape, dtype: Any, seed: int) -> tuple[Float[Array, "batch length _ dim"], ...]:
    """Returns query, key, value and the gradient of out: normal(0, 1)."""
    keys = jax.random.split(jax.random.key(seed), 4)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    return tuple(
        jax.random.normal(key, (shape.batch, shape.length, n, shape.head_dim), dtype)
        for key, n in zip(keys, heads, strict=True)
    )


def parameters(
    case: str, shape: Shape, width: int, learned: pathlib.Path | None = None, seed: int = 0
) -> dict[str, Float[Array, "heads ..."]]:
    """Returns distance_bias, distance_slope where the case has one, and offset.

    Args:
      case: "dense": the paper's initialisation, bias normal with standard deviation 0.02
        and no tail; every tile is live. "alibi": b_h(x) = -m_h x with m_h =
        2^(-8 (h + 1) / heads), and that slope. "learned": biases and offsets of a
        trained model, heads taken evenly from all its layers. "biased_softmax": the bias
        of "dense" and no offset. Elsewhere the offset is -1.
      shape: of the call.
      width: of the table, but for "learned".
      learned: an npz file with bias [layers, heads, width] and tau [layers, heads].
      seed: of the normal biases.
    """
    offset = -jnp.ones(shape.heads)
    if case in ("dense", "biased_softmax"):
        bias = 0.02 * jax.random.normal(jax.random.key(seed), (shape.heads, width))
        return {"distance_bias": bias} | ({"offset": offset} if case == "dense" else {})
    if case == "alibi":
        slope = 2.0 ** (-8 * jnp.arange(1, shape.heads + 1) / shape.heads)
        bias = -slope[:, None] * jnp.arange(width)
        return {"distance_bias": bias, "distance_slope": slope, "offset": offset}
    assert case == "learned" and learned is not None
    with np.load(learned) as file:
        every = file["bias"].reshape(-1, file["bias"].shape[-1])
        taus = file["tau"].reshape(-1)
    chosen = np.arange(shape.heads) * len(every) // shape.heads
    return {
        "distance_bias": jnp.asarray(every[chosen], jnp.float32),
        "offset": jnp.asarray(taus[chosen], jnp.float32),
    }


def call(
    tensors: Any,
    parameters: dict[str, Array],
    skip_mass: float = 1e-6,
    window: int | None = None,
    segment_ids: Array | None = None,
) -> tuple[Problem, Inputs]:
    """Returns what a backend gets of a call; arguments as from the functions above."""
    query, key, value, *_ = tensors
    made = Call(
        query,
        key,
        value,
        parameters.get("distance_bias"),
        parameters.get("distance_slope"),
        parameters.get("offset"),
        offset_divisor="visible",
        renormalize=False,
        segment_ids=segment_ids,
        query_start=None,
        chunk_starts=None,
        window=None if window is None or window >= key.shape[1] else window,
        scale=query.shape[-1] ** -0.5,
        skip_mass=skip_mass,
        return_weights=False,
    )
    return made.problem(), made.inputs()
