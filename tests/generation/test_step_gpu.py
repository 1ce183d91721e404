"""A step in few kernels is the model's, on a GPU: `make test-gpu`."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest

from lazyattn.generation import cache, decode_step, plan_cache, prefill, prepare, step
from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.parameters import init_params
from pallas_kernels.triton import support

_REASON = support.refusal(64, 64, "bfloat16")
if _REASON is not None:
    pytest.skip(f"no Triton here: {_REASON}", allow_module_level=True)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(support.refuses_in_place() is not None, reason="it writes in place"),
]


# On an H200, whose float32 products are TF32, logits differed by 0.0015 at most.
@pytest.mark.parametrize("dtype, atol", [("float32", 5e-3), ("bfloat16", 0.1)])
@pytest.mark.parametrize("new", [1, 3])
def test_few_kernels_do_what_the_model_does(dtype, atol, new):
    attention = AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=64, qk_norm=True)
    config = ModelConfig(
        vocab_size=320, width=512, num_layers=3, attention=attention, compute_dtype=dtype
    )
    params = init_params(config, jax.random.key(0))
    prepared = prepare(params, config)
    tokens = np.random.default_rng(0).integers(0, 320, (8, 600 + 4 * new))

    def steps(fused):
        model = dataclasses.replace(prepared, fused=fused)
        held = cache.init_cache(plan_cache(params, config, 640), 8)
        _, held = prefill(model, held, tokens[:, :600], np.arange(600, 40, -75))
        found = []
        for n in range(600, 600 + 4 * new, new):
            logits, held = decode_step(model, held, tokens[:, n : n + new])
            found.append(np.asarray(logits))
        return np.stack(found)

    with mock.patch.object(step, "forward", wraps=step.forward) as forward:
        found = steps(True)
    assert forward.called
    true = steps(False)
    np.testing.assert_allclose(found, true, atol=atol)
