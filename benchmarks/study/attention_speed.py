"""Times attention on a trained model's own queries, keys and biases, beside cuDNN's softmax."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from benchmarks import timing
from lazyattn import lazy_attention
from lazyattn.inspect.walk import LayerInput, walk
from lazyattn.model.attention_layer import variant_arguments
from lazyattn.model.config import ModelConfig

CALLS, ROUNDS = 3, 5


def times_alone(config: ModelConfig) -> bool:
    """Returns whether a layer of the model is one call of the op, so that it can be timed alone."""
    return config.attention.has_bias and config.attention.window is None


def times(
    params: Mapping[str, Any], inputs: Int[Array, "rows length"], *, config: ModelConfig
) -> dict[str, float]:
    """Returns milliseconds of all layers' attention: the model's, and softmax on the same inputs.

    Queries, keys, biases and offsets are the model's own, of rows that are one document each.
    Values are random: no time depends on them. The bias is the model's table with its tail, as
    in training. Softmax is cuDNN's on a GPU, XLA's elsewhere.

    Args:
      params: the model's parameters.
      inputs: token ids.
      config: the model; `times_alone` must be true of it.

    Returns:
      "forward", "training" (forward and backward), "softmax_forward", "softmax_training".
    """
    att = config.attention

    def observe(layer: LayerInput, x: Array, carry: None) -> tuple[None, dict[str, Array]]:
        del x
        kept = {"query": layer.query, "key": layer.key}
        if layer.bias is not None:
            kept["distance_bias"] = layer.bias[:, : att.bias_width]
            if att.bias_kind == "decay" or att.bias_tail:
                kept["distance_slope"] = layer.bias[:, -2] - layer.bias[:, -1]
        if layer.offset is not None:
            kept["offset"] = layer.offset
        return carry, kept

    ones = jnp.ones_like(inputs)
    stacked = jax.jit(lambda params, x: walk(params, config, x, ones, observe)[1])(params, inputs)
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(config.num_layers)]
    shape, dtype = layers[0]["key"].shape, layers[0]["key"].dtype
    value = jax.random.normal(jax.random.key(0), shape, dtype)
    d_out = jax.random.normal(jax.random.key(1), layers[0]["query"].shape, dtype)
    more = variant_arguments(att, inputs.shape[1])
    more["skip_mass"] = att.skip_mass

    def ours(layer: dict[str, Array], value: Array) -> Array:
        given = dict(layer)
        return lazy_attention(given.pop("query"), given.pop("key"), value, **given, **more)

    def softmax(layer: dict[str, Array], value: Array) -> Array:
        by = "cudnn" if jax.default_backend() == "gpu" else "xla"
        return jax.nn.dot_product_attention(
            layer["query"], layer["key"], value, is_causal=True, implementation=by
        )

    runs = {}
    for name, attention in (("", ours), ("softmax_", softmax)):

        def backward(layer: dict[str, Array], value: Array, attention: Any = attention) -> Any:
            _, vjp = jax.vjp(attention, layer, value)
            return vjp(d_out)

        for part, function in (("forward", attention), ("training", backward)):
            jitted = jax.jit(function)
            runs[name + part] = lambda f=jitted: [f(layer, value) for layer in layers]
    return {
        name: round(found[0], 4)
        for name, found in timing.rounds_of(runs, calls=CALLS, rounds=ROUNDS).items()
    }
