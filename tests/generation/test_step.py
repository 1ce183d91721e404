"""A step in few kernels is the model's: logits and cache, by Triton's interpreter."""

from tests.pallas_kernels import triton_interpreter as interpreter  # isort: skip

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.generation import cache as cache_lib
from lazyattn.generation import decode_step, plan_cache, prefill, prepare, step
from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.parameters import init_params

ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True, bias_width=64)
CONFIG = ModelConfig(
    vocab_size=96, width=64, num_layers=2, mlp_width=96, attention=ATTENTION,
    compute_dtype="float32", scan_layers=True,
)  # fmt: skip


def _steps(model, cache, tokens):
    """Returns the logits of some steps, and the cache."""
    found = []
    for n in range(tokens.shape[1]):
        logits, cache = decode_step(model, cache, tokens[:, n])
        found.append(logits)
    return np.stack(found), cache


@pytest.mark.slow
@pytest.mark.parametrize("qk_norm, kind", [(True, "spans"), (False, "full")])
def test_few_kernels_do_what_the_model_does(qk_norm, kind):
    attention = dataclasses.replace(ATTENTION, qk_norm=qk_norm)
    config = dataclasses.replace(CONFIG, attention=attention)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), params)
    model = prepare(params, config)
    plan = plan_cache(params, config, 40) if kind == "spans" else cache_lib.full_plan(config, 40)
    tokens = np.random.default_rng(0).integers(0, 96, (3, 12))

    def begun():
        cache = cache_lib.init_cache(plan, 3)
        return prefill(model, cache, tokens[:, :9], [9, 5, 1])[1]

    new = jnp.asarray(tokens[:, 9:]).at[2, 1].set(-1)
    true, held = _steps(model, begun(), new)
    cache = begun()
    with interpreter.interpreted(interpreter.blocks(64, 64)):
        assert step.unsupported(model.config, cache, 1) is None
        with mock.patch.object(step, "forward", wraps=step.forward) as forward:
            found, mine = _steps(model, cache, new)
    assert forward.called
    np.testing.assert_allclose(found, true, atol=2e-4)
    for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(held), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"output_gate": True}, "a gate"),
        ({"rope": False}, "RoPE"),
        ({}, "65 tokens"),
    ],
)
def test_what_is_left_to_the_model(change, why):
    config = dataclasses.replace(CONFIG, attention=dataclasses.replace(ATTENTION, **change))
    rows = 65 if not change else 2
    cache = jax.eval_shape(lambda: cache_lib.init_cache(cache_lib.full_plan(config, 40), rows))
    with interpreter.interpreted(interpreter.blocks(64, 64)):
        assert why in step.unsupported(config, cache, 1)
    assert step.unsupported(CONFIG, cache, 1) is not None
