"""The layer for models that aren't ours, held to the layer of ours; and its modules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

from lazyattn import InputError, linen, nnx
from lazyattn.call import document_positions
from lazyattn.layer import AttentionLayer
from lazyattn.model.attention_layer import Attention
from tests.model.tiny import make_config

SETTINGS = {"num_heads": 4, "num_kv_heads": 2, "bias_width": 6, "implementation": "xla"}
X = np.random.default_rng(0).standard_normal((2, 20, 16)).astype(np.float32)
IDS = jnp.asarray([[1] * 9 + [2] * 11, [1] * 20])


@pytest.mark.parametrize(
    ("variant", "settings", "ours"),
    [
        ("lazy", {}, {}),
        ("lazy", {"window": 3, "head_dim": 6}, {"window": 3, "head_dim": 6}),
        ("biased_softmax", {"offset_init": None}, {}),
        ("lazy_no_bias", {"bias_width": 0, "rope_base": None}, {"rope": False}),
        ("softmax", {"bias_width": 0, "offset_init": None}, {}),
    ],
)
def test_it_is_the_model_s_layer(variant, settings, ours):
    layer = AttentionLayer(**SETTINGS | settings)
    parameters = jax.jit(layer.init, static_argnums=1)(jax.random.key(0), 16)
    noise = np.random.default_rng(1)
    parameters = {k: x + 0.1 * noise.standard_normal(x.shape) for k, x in parameters.items()}
    model = Attention(make_config(variant, attention=ours))
    true = jax.jit(model.apply)({"params": parameters}, X, document_positions(IDS), IDS)
    theirs = jax.eval_shape(lambda: model.init(jax.random.key(0), X, IDS, IDS)["params"])
    assert set(parameters) == set(theirs)
    np.testing.assert_allclose(jax.jit(layer.apply)(parameters, X, IDS), true, atol=1e-6)


def test_the_modules_are_the_layer():
    fields = dataclasses.fields(AttentionLayer)
    module = linen.LazyAttention(num_heads=8)
    assert all(getattr(module, f.name) == f.default for f in fields if f.name != "num_heads")

    layer, module = AttentionLayer(**SETTINGS), linen.LazyAttention(**SETTINGS)
    parameters = jax.jit(module.init)(jax.random.key(0), X)["params"]
    true = jax.jit(layer.apply)(parameters, X, IDS)
    assert {k: (x.shape, x.dtype) for k, x in parameters.items()} == {
        k: (shape, jnp.float32) for k, (_, shape) in layer.parameters(16).items()
    }
    np.testing.assert_array_equal(jax.jit(module.apply)({"params": parameters}, X, IDS), true)

    module = nnx.LazyAttention(16, **SETTINGS, rngs=flax_nnx.Rngs(0))
    _, state = flax_nnx.split(module)
    assert set(state) == set(parameters)
    for name, x in parameters.items():
        getattr(module, name)[...] = x
    np.testing.assert_array_equal(flax_nnx.jit(lambda m: m(X, IDS))(module), true)
    gradients = flax_nnx.jit(flax_nnx.grad(lambda m: (m(X, IDS) ** 2).sum()))(module)
    assert all(np.any(x != 0) for x in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_half_precision():
    layer = AttentionLayer(2, bias_width=4)
    parameters = layer.init(jax.random.key(0), 16)
    out = layer.apply(parameters, X.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16 and out.shape == X.shape
    np.testing.assert_allclose(out.astype(jnp.float32), layer.apply(parameters, X), atol=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AttentionLayer(0), "num_heads is 0, but it must be at least 1."),
        (lambda: AttentionLayer(4, 3), "num_kv_heads is 3, .* a divisor of num_heads = 4."),
        (lambda: AttentionLayer(4, head_dim=0), "head_dim is 0, but it must be None or at"),
        (lambda: AttentionLayer(4, bias_width=-1), "bias_width is -1, but it must be at least 0."),
        (lambda: AttentionLayer(4, offset_init=np.inf), "offset_init is inf, but"),
        (lambda: AttentionLayer(4, rope_base=0.0), "rope_base is 0.0, but it must be None, or"),
        (lambda: AttentionLayer(4, window=0), "window is 0, but it must be None or at least 1."),
        (lambda: AttentionLayer(4).parameters(18), "width is 18, but it must be a multiple of"),
        (lambda: AttentionLayer(4).parameters(12), "head_dim is 3, but it must be even"),
        (
            lambda: AttentionLayer(4).apply({"query": np.ones((8, 4, 2))}, X),
            "x.shape is \\(2, 20, 16\\), but it must be \\[batch, length, 8\\].",
        ),
        (
            lambda: AttentionLayer(4).apply({"query": np.ones((16, 4, 4))}, X, IDS[:, 1:]),
            "segment_ids.shape is \\(2, 19\\), but it must be \\(2, 20\\).",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()
