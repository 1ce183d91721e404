import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.model.accounting import flops_per_token, parameter_counts
from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.parameters import parameter_shapes
from lazyattn.model.transformer import Transformer, logits, output_embedding
from tests.model.tiny import make_config, make_params


def test_counts_by_group():
    counts = parameter_counts(parameter_shapes(make_config(attention={"qk_norm": True})))
    assert counts == {
        "embedding": 2 * 31 * 16,
        "attention": 2 * 16 * (2 * 16 + 2 * 8),
        "mlp": 2 * 3 * 16 * 24,
        "norm": 2 * (2 * 16 + 2 * 4) + 16,
        "distance_bias": 2 * (4 * 6 + 4),
        "offset": 2 * 4,
        "total": sum(counts.values()) - counts["total"],
    }


@pytest.mark.parametrize("scan", [True, False])
def test_every_parameter_is_counted(scan):
    shapes = parameter_shapes(make_config(scan_layers=scan, attention={"qk_norm": True}))
    assert parameter_counts(shapes)["total"] == sum(x.size for x in jax.tree.leaves(shapes))


def test_the_paper_s_340m():
    config = ModelConfig(attention=AttentionConfig(num_heads=16))
    counts = parameter_counts(parameter_shapes(config))
    blocks = 24 * (4 * 1024**2 + 3 * 1024 * 2816)
    assert counts["attention"] + counts["mlp"] == blocks
    assert counts["embedding"] == 2 * 32_000 * 1024
    assert 365e6 < counts["total"] - counts["distance_bias"] < 375e6


def test_flops_are_what_the_compiler_counts():
    length = 24
    # Wide and shallow, so that products outweigh everything else.
    config = make_config("softmax", width=128, mlp_width=256, vocab_size=500, scan_layers=False)
    config = dataclasses.replace(
        config, attention=dataclasses.replace(config.attention, rope=False)
    )
    params = make_params(config)

    def forward(params, inputs):
        hidden = Transformer(config).apply({"params": params}, inputs)
        return logits(hidden, output_embedding(params, config))

    compiled = jax.jit(forward).lower(params, jnp.zeros((1, length), jnp.int32)).compile()
    counted = compiled.cost_analysis()["flops"] / length
    flops = flops_per_token(config, length)
    # The definition computes masked pairs too: 2 length / (length + 1) as many.
    expected = flops.weights + flops.attention * 2 * length / (length + 1)
    np.testing.assert_allclose(counted, expected, rtol=0.1)


def test_flops_by_hand():
    flops = flops_per_token(make_config(), length=11)
    weights = 2 * (16 * (2 * 16 + 2 * 8) + 3 * 16 * 24) + 31 * 16
    assert flops.weights == 2 * weights
    assert flops.attention == 2 * 2 * 2 * 16 * 6  # layers, products, flops, width, mean keys
    assert flops.forward == flops.weights + flops.attention
    assert flops.training == 3 * flops.forward


def test_flops_of_a_window_by_counting():
    attention = {"num_heads": 4, "num_kv_heads": 4, "global_share": 0.25, "window": 3}
    plain, gated = (
        flops_per_token(make_config(attention=attention | {"output_gate": gate}), length=11)
        for gate in (False, True)
    )
    seen = [sum(min(i + 1, keys) for i in range(11)) / 11 for keys in (3, 3, 3, 11)]
    np.testing.assert_allclose(plain.attention, 4 * 2 * 4 * sum(seen))  # layers, head size
    assert gated.weights == plain.weights + 2 * 2 * 16 * 16
    wide = flops_per_token(make_config(attention=attention | {"window": 99}), length=11)
    assert wide == flops_per_token(make_config(attention={"num_kv_heads": 4}), length=11)
