import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lazyattn import sharding
from lazyattn.model.config import RECIPES, VARIANTS
from lazyattn.model.distance_bias import NAMES
from lazyattn.model.parameters import (
    init_params,
    logical_axes,
    parameter_shapes,
    partition_specs,
    stack_blocks,
    unstack_blocks,
)
from lazyattn.model.transformer import Transformer
from tests.model.tiny import VOCAB, dealt_slopes, make_config

CONFIG = make_config(attention={"qk_norm": True, "output_gate": True, "qkv_bias": True})
IS_NAMES = {"is_leaf": lambda node: isinstance(node, tuple)}


def _initial(config, part=lambda params: params):
    """Returns a part of the initial parameters, for the compiler to leave the rest out."""
    return jax.jit(lambda key: part(init_params(config, key)))(jax.random.key(0))


def test_names_shapes_and_axes():
    attention = {
        "query": ((2, 16, 4, 4), ("layers", "embed", "heads", "head_dim")),
        "key": ((2, 16, 2, 4), ("layers", "embed", "kv_heads", "head_dim")),
        "value": ((2, 16, 2, 4), ("layers", "embed", "kv_heads", "head_dim")),
        "query_bias": ((2, 4, 4), ("layers", "heads", "head_dim")),
        "key_bias": ((2, 2, 4), ("layers", "kv_heads", "head_dim")),
        "value_bias": ((2, 2, 4), ("layers", "kv_heads", "head_dim")),
        "output": ((2, 4, 4, 16), ("layers", "heads", "head_dim", "embed")),
        "query_norm": {"scale": ((2, 4), ("layers", "norm"))},
        "key_norm": {"scale": ((2, 4), ("layers", "norm"))},
        "output_gate": ((2, 16, 4, 4), ("layers", "embed", "heads", "head_dim")),
        "distance_delta": ((2, 4, 6), ("layers", "heads", "distance")),
        "distance_log_slope": ((2, 4), ("layers", "heads")),
        "offset": ((2, 4), ("layers", "heads")),
    }
    mlp = {
        "gate": ((2, 16, 24), ("layers", "embed", "mlp")),
        "up": ((2, 16, 24), ("layers", "embed", "mlp")),
        "down": ((2, 24, 16), ("layers", "mlp", "embed")),
    }
    norm = {"scale": ((2, 16), ("layers", "norm"))}
    expected = {
        "embedding": ((VOCAB, 16), ("vocab", "embed")),
        "blocks": {
            "attention_norm": norm,
            "attention": attention,
            "mlp_norm": norm,
            "mlp": mlp,
        },
        "final_norm": {"scale": ((16,), ("norm",))},
        "unembedding": ((VOCAB, 16), ("vocab", "embed")),
    }
    shapes = jax.tree.map(lambda leaf: leaf.shape, parameter_shapes(CONFIG))
    axes = logical_axes(CONFIG)
    assert shapes == jax.tree.map(lambda leaf: leaf[0], expected, **IS_NAMES)
    assert axes == jax.tree.map(lambda leaf: leaf[1], expected, **IS_NAMES)


@pytest.mark.parametrize(
    ("variant", "scan"), [*((name, True) for name in VARIANTS), ("lazy", False)]
)
def test_every_parameter_is_float32_and_every_axis_has_a_rule(variant, scan):
    config = make_config(variant, scan_layers=scan, tie_embeddings=True)
    rules = dict(sharding.RULES)
    shapes, axes, specs = parameter_shapes(config), logical_axes(config), partition_specs(config)

    def check(shape, names, spec):
        assert shape.dtype == jnp.float32
        assert len(names) == len(shape.shape) and all(name in rules for name in names)
        assert spec == sharding.spec(*names)

    jax.tree.map(check, shapes, axes, specs)
    assert len(jax.tree.leaves(axes, **IS_NAMES)) == len(jax.tree.leaves(shapes))
    assert "unembedding" not in shapes


def test_unrolled_layers_have_names_axes_and_values_of_their_own():
    config = dataclasses.replace(CONFIG, scan_layers=False)
    tokens = jnp.zeros((1, 1), jnp.int32)
    own = jax.eval_shape(lambda: Transformer(config).init(jax.random.key(0), tokens)["params"])
    boxes = {"is_leaf": lambda node: isinstance(node, nn.Partitioned)}
    assert logical_axes(config) == jax.tree.map(lambda box: box.names, own, **boxes)
    assert parameter_shapes(config) == nn.meta.unbox(own)
    first, second = _initial(config, lambda params: (params["blocks_0"], params["blocks_1"]))
    assert not np.allclose(first["mlp"]["up"], second["mlp"]["up"])


def test_initial_scales():
    config = make_config(width=64, mlp_width=96, vocab_size=200, num_layers=3)
    params = _initial(config)
    att, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]
    residual = (2 * config.num_layers) ** -0.5
    for matrix, std in [
        (params["embedding"], 64**-0.5),
        (params["unembedding"], 64**-0.5),
        (att["query"], 64**-0.5),
        (att["key"], 64**-0.5),
        (att["value"], 64**-0.5),
        (att["output"], 64**-0.5 * residual),
        (mlp["gate"], 64**-0.5),
        (mlp["up"], 64**-0.5),
        (mlp["down"], 96**-0.5 * residual),
    ]:
        np.testing.assert_allclose(np.std(matrix), std, rtol=0.05)
        assert abs(np.mean(matrix)) < 0.05 * std
    assert not np.allclose(att["query"][0], att["query"][1])
    assert not np.allclose(params["embedding"], params["unembedding"])
    for norm in (params["blocks"]["attention_norm"], params["final_norm"]):
        np.testing.assert_array_equal(norm["scale"], 1)


def _recipe(name):
    names = {name for both in NAMES.values() for name in both} | {"offset"}
    return _initial(
        make_config(attention=RECIPES[name]),
        lambda params: {k: v for k, v in params["blocks"]["attention"].items() if k in names},
    )


def test_sharp_recipe_is_the_default():
    assert make_config(attention=RECIPES["sharp"]) == make_config()
    att = _recipe("sharp")
    np.testing.assert_array_equal(att["offset"], -0.5)
    for layer in range(2):
        theta = att["distance_log_slope"][layer]
        np.testing.assert_allclose(theta, np.log(dealt_slopes(4, 2)), rtol=1e-6)
    np.testing.assert_array_equal(att["distance_delta"], np.zeros((2, 4, 6)))
    assert set(att) == {"distance_log_slope", "distance_delta", "offset"}


def test_sharp_table_recipe():
    att = _recipe("sharp_table")
    np.testing.assert_array_equal(att["offset"], -0.5)
    for layer in range(2):
        np.testing.assert_array_equal(att["distance_slope"][layer], dealt_slopes(4, 2))
        expected = -dealt_slopes(4, 2)[:, None] * np.arange(6)
        np.testing.assert_allclose(att["distance_bias"][layer], expected, rtol=1e-6)


def test_paper_recipe():
    att = _recipe("paper")
    np.testing.assert_array_equal(att["offset"], -1.0)
    assert "distance_slope" not in att
    np.testing.assert_allclose(np.std(att["distance_bias"]), 0.02, rtol=0.3)
    assert not np.allclose(att["distance_bias"][0], att["distance_bias"][1])


def test_stacking_and_unstacking():
    scanned = {
        "blocks": {"mlp": {"up": np.arange(6.0).reshape(3, 2)}},
        "final_norm": {"scale": np.ones(2)},
    }
    unrolled = unstack_blocks(scanned)
    assert set(unrolled) == {"blocks_0", "blocks_1", "blocks_2", "final_norm"}
    np.testing.assert_array_equal(unrolled["blocks_2"]["mlp"]["up"], [4, 5])
    again = stack_blocks(unrolled)
    jax.tree.map(np.testing.assert_array_equal, again, scanned)


def test_an_unrolled_model_has_the_unstacked_names():
    scanned = jax.tree.map(lambda leaf: np.zeros(leaf.shape), parameter_shapes(CONFIG))
    unrolled = parameter_shapes(dataclasses.replace(CONFIG, scan_layers=False))
    found = jax.tree.map(lambda leaf: leaf.shape, unstack_blocks(scanned))
    assert found == jax.tree.map(lambda leaf: leaf.shape, unrolled)
