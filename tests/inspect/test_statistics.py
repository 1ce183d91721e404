import functools

import jax
import numpy as np
import pytest

from lazyattn.inspect.statistics import attention_statistics
from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.parameters import init_params
from lazyattn.model.transformer import attention_weights

SEGMENTS = np.asarray([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32)


@functools.cache
def _model(variant, **settings):
    config = ModelConfig(
        vocab_size=11,
        width=16,
        num_layers=2,
        compute_dtype="float32",
        attention=AttentionConfig(
            variant=variant, num_heads=2, bias_width=8, implementation="xla", **settings
        ),
    )
    return config, jax.jit(init_params, static_argnums=0)(config, jax.random.PRNGKey(3))


def _batch():
    inputs = np.random.default_rng(0).integers(11, size=SEGMENTS.shape).astype(np.int32)
    return {"inputs": inputs, "segment_ids": SEGMENTS}


def test_lazy_statistics_against_the_weights_themselves():
    config, params = _model("lazy", offset_init=-0.8)
    batch = _batch()
    found = attention_statistics(params, config, batch)
    weights_of = jax.jit(attention_weights, static_argnums=1)
    weights = np.asarray(weights_of(params, config, batch["inputs"], SEGMENTS))
    queries = np.argwhere(SEGMENTS > 0)
    assert found.queries == len(queries)
    start = {(0, i): 0 if i < 3 else 3 for i in range(7)} | {(1, i): 0 for i in range(8)}
    for layer, head in np.ndindex(2, 2):
        w = weights[layer, :, head]
        visible = [w[r, i, start[r, i] : i + 1] for r, i in queries]
        later = [values[0] for values in visible if len(values) > 1]
        where = layer, head
        assert found.zero_share[where] == pytest.approx(np.mean(np.concatenate(visible) == 0))
        assert found.mass[where] == pytest.approx(np.mean([v.sum() for v in visible]), rel=1e-5)
        assert found.first_token[where] == pytest.approx(np.mean(later), rel=1e-5)
    assert 0.1 < found.zero_share.mean() < 0.9


@pytest.mark.slow
def test_softmax_keeps_all_mass_and_has_no_zeros():
    config, params = _model("softmax")
    found = attention_statistics(params, config, _batch())
    np.testing.assert_array_equal(found.zero_share, 0)
    np.testing.assert_allclose(found.mass, 1, rtol=1e-5)
    assert np.all(found.first_token > 0.05)
    assert attention_statistics(params, config, _batch(), max_rows=1).queries == 7


@pytest.mark.slow
def test_an_offset_below_every_weight_leaves_nothing():
    config, params = _model("lazy_constant_offset", offset_init=-1.5)
    found = attention_statistics(params, config, _batch())
    np.testing.assert_array_equal(found.zero_share, 1)
    np.testing.assert_array_equal(found.mass, 0)
    np.testing.assert_array_equal(found.first_token, 0)


def test_padding_alone_is_refused():
    config, params = _model("softmax")
    batch = _batch() | {"segment_ids": np.zeros_like(SEGMENTS)}
    with pytest.raises(ValueError, match="only padding"):
        attention_statistics(params, config, batch)
