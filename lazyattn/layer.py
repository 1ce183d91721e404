"""An attention layer around the op for models that aren't ours, as plain functions.

Projections, RoPE, the learned bias, the offset and one call of `lazy_attention`.
`lazyattn.linen` and `lazyattn.nnx` are modules of it. The model in `lazyattn.model` has a layer
of its own, with more settings; parameters have the same names, shapes and meaning there.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lazyattn.allowed import at_least, check_settings
from lazyattn.attention import document_starts, lazy_attention
from lazyattn.call import is_number
from lazyattn.errors import InputError, require
from lazyattn.model.config import AttentionConfig
from lazyattn.model.distance_bias import bias_arguments, bias_parameters
from lazyattn.rotary import rotate


@dataclasses.dataclass(frozen=True)
class AttentionLayer:
    """Causal Lazy Attention from [batch, length, width] to the same; a static, hashable setting.

    The bias is learned as b_h(x) = -exp(theta_h) x + delta_h[min(x, bias_width - 1)], which
    starts as ALiBi and always falls past its table: docs/lazy_attention.md, "A bias that
    trains". The common learning rate will do for theta, as in our default recipe.

    Attributes:
      num_heads: query heads.
      num_kv_heads: key/value heads, a divisor of num_heads; None: as many.
      head_dim: size of a head; None: width / num_heads.
      bias_width: distances with an entry of delta of their own; 0: no bias.
      offset_init: what tau of every head starts as; None: no offset, that is softmax.
      rope_base: base of RoPE; None: no RoPE.
      window: a query sees its last `window` keys only; None: all of its document.
      skip_mass: as in `lazy_attention`.
      implementation: as there.

    Raises:
      InputError: if a value is none of those allowed.

    Source: arXiv 2601.00919, with our bias; RoPE: arXiv 2104.09864.
    """

    num_heads: Annotated[int, at_least(1)]
    num_kv_heads: int | None = None
    head_dim: Annotated[int | None, at_least(1)] = None
    bias_width: Annotated[int, at_least(0)] = 1024
    offset_init: float | None = -0.5
    rope_base: float | None = 10_000.0
    window: Annotated[int | None, at_least(1)] = None
    skip_mass: float = 1e-6
    implementation: str | None = None

    def __post_init__(self):
        kv_heads, base, tau = self.kv_heads, self.rope_base, self.offset_init
        check_settings(self, "")
        require(
            kv_heads >= 1 and self.num_heads % kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"None or a divisor of num_heads = {self.num_heads}",
        )
        require(tau is None or is_number(tau), "offset_init", tau, "None or a finite number")
        require(
            base is None or 0 < base < math.inf, "rope_base", base, "None, or positive and finite"
        )

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def parameters(self, width: int) -> dict[str, tuple[Callable[..., Array], tuple[int, ...]]]:
        """Returns the initializer and the shape of each parameter, by name.

        query [width, num_heads, head_dim]; key and value [width, kv_heads, head_dim]; output
        [num_heads, head_dim, width]; and where the layer has them distance_delta
        [num_heads, bias_width], distance_log_slope [num_heads] and offset [num_heads]. An
        initializer takes a PRNG key, a shape and a dtype.

        Args:
          width: size of what goes in and comes out.

        Raises:
          InputError: if width and the sizes of heads don't go together.

        Source: LeCun initialization, truncated normal; biases as `lazyattn.model` has them.
        """
        if self.head_dim is None:
            allowed = f"a multiple of num_heads = {self.num_heads} while head_dim is None"
            require(width % self.num_heads == 0, "width", width, allowed)
        size = width // self.num_heads if self.head_dim is None else self.head_dim
        if self.rope_base is not None:
            require(size % 2 == 0, "head_dim", size, "even, since RoPE rotates pairs")

        def matrix(in_axis: Any, out_axis: Any) -> Callable[..., Array]:
            make = jax.nn.initializers.variance_scaling
            return make(1.0, "fan_in", "truncated_normal", in_axis=in_axis, out_axis=out_axis)

        found: dict[str, Any] = {"query": (matrix(0, (1, 2)), (width, self.num_heads, size))}
        for name in ("key", "value"):
            found[name] = matrix(0, (1, 2)), (width, self.kv_heads, size)
        found["output"] = matrix((0, 1), 2), (self.num_heads, size, width)
        for name, bias in bias_parameters(self._config).items():
            found[name] = bias.init, bias.shape
        if self.offset_init is not None:
            found["offset"] = jax.nn.initializers.constant(self.offset_init), (self.num_heads,)
        return found

    def init(self, rng: Array, width: int) -> dict[str, Float[Array, "..."]]:
        """Returns new float32 parameters.

        Args:
          rng: a key of `jax.random.key`.
          width: size of what goes in and comes out.

        Raises:
          InputError: as `parameters`.
        """
        makers = self.parameters(width)
        keys = jax.random.split(rng, len(makers))
        return {
            name: init(key, shape, jnp.float32)
            for key, (name, (init, shape)) in zip(keys, makers.items(), strict=True)
        }

    def apply(
        self,
        parameters: Mapping[str, Float[Array, "..."]],
        x: Float[Array, "batch length width"],
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Returns the attention of x to itself, in x's shape and dtype.

        Args:
          parameters: as `init` makes them. Projections are cast to x's dtype; bias and offset
            stay as they are.
          x: float32, bfloat16, float16 or float64.
          segment_ids: packed documents are runs of equal ids; RoPE counts from the start of each.
            None: one document a row.

        Raises:
          InputError: for shapes or dtypes that don't fit, or a call that the named
            implementation can't do.
        """
        width = parameters["query"].shape[0]
        require(
            x.ndim == 3 and x.shape[2] == width, "x.shape", x.shape, f"[batch, length, {width}]"
        )
        if segment_ids is not None and segment_ids.shape != x.shape[:2]:
            raise InputError(
                f"segment_ids.shape is {segment_ids.shape}, but it must be {x.shape[:2]}."
            )
        query, key, value = (
            jnp.einsum("blw,whd->blhd", x, parameters[name].astype(x.dtype))
            for name in ("query", "key", "value")
        )
        if self.rope_base is not None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
            if segment_ids is not None:
                positions -= document_starts(segment_ids)
            query, key = (rotate(heads, positions, self.rope_base) for heads in (query, key))
        learned: dict[str, Any] = bias_arguments(parameters, self._config)
        if self.offset_init is not None:
            learned["offset"] = parameters["offset"]
        out = lazy_attention(
            query,
            key,
            value,
            **learned,
            segment_ids=segment_ids,
            window=self.window,
            skip_mass=self.skip_mass,
            implementation=self.implementation,
        )
        return jnp.einsum("blhd,hdw->blw", out, parameters["output"].astype(x.dtype))

    @property
    def _config(self) -> AttentionConfig:
        """What `lazyattn.model` calls a layer whose bias is learned alike."""
        return AttentionConfig(
            variant="lazy" if self.bias_width else "lazy_no_bias",
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            bias_width=max(self.bias_width, 1),
        )
