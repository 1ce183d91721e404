"""LoRA: the same function at the start, after merging, and gradients for it alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.lora import is_lora, merged
from lazyattn.model.objective import make_loss_fn
from lazyattn.model.parameters import init_params, parameter_shapes, partition_specs
from lazyattn.model.taken_over import is_new
from lazyattn.model.transformer import Transformer
from tests.training import toy

CONFIG = ModelConfig(
    vocab_size=toy.VOCAB,
    width=8,
    num_layers=2,
    mlp_width=12,
    compute_dtype="float32",
    lora_rank=3,
    lora_alpha=6.0,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, bias_width=4, output_gate=True),
)
PLAIN = dataclasses.replace(CONFIG, lora_rank=0)
TOKENS = jnp.arange(10)[None] % toy.VOCAB
MATRICES = {"query", "key", "value", "output", "output_gate", "gate", "up", "down"}


def _flat(params):
    return {
        tuple(part.key for part in path): x
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }


_initial = jax.jit(init_params, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _apply(config, params):
    return Transformer(config).apply({"params": params}, TOKENS)


@pytest.fixture(scope="module")
def params():
    return _initial(CONFIG, jax.random.key(0))


def test_it_starts_as_the_model_without(params):
    own = {path: x for path, x in _flat(params).items() if not is_lora(path[-1])}
    assert own.keys() == _flat(parameter_shapes(PLAIN)).keys()
    assert {path[-1].rsplit("_lora_")[0] for path in _flat(params) if is_lora(path[-1])} == MATRICES
    np.testing.assert_array_equal(_apply(CONFIG, params), _apply(PLAIN, params))
    assert jax.tree.structure(partition_specs(CONFIG)) == jax.tree.structure(params)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_merged_it_is_the_same_function(scan):
    config = dataclasses.replace(CONFIG, scan_layers=scan)
    params = _initial(config, jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.1 if path[-1].key.endswith("_lora_b") else x, params
    )
    found, plain = merged(params, config), dataclasses.replace(PLAIN, scan_layers=scan)
    assert jax.tree.structure(found) == jax.tree.structure(partition_specs(plain))
    assert np.abs(_apply(config, params) - _apply(plain, params)).max() > 0.01
    np.testing.assert_allclose(_apply(config, params), _apply(plain, found), atol=1e-5)


@pytest.mark.parametrize("distill", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_frozen_weights_get_no_gradient(params, distill):
    params = jax.tree.map(lambda x: x + 0.1, params)
    batch = toy.batch(0)
    losses = {
        frozen: make_loss_fn(CONFIG, distill=distill, frozen=frozen) for frozen in (True, False)
    }
    found = {
        frozen: _flat(jax.jit(jax.grad(lambda p, loss=loss: loss(p, batch).objective))(params))
        for frozen, loss in losses.items()
    }
    for path, gradient in found[True].items():
        if is_new(path):
            np.testing.assert_allclose(gradient, found[False][path], rtol=1e-4, atol=1e-6)
            assert np.any(gradient)
        else:
            assert not np.any(gradient), path
