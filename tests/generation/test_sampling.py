import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.errors import InputError
from lazyattn.generation.sampling import SamplingConfig, next_token

LOGITS = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]))
DRAWS = 4000
_next_token = jax.jit(next_token, static_argnums=2)


def _draws(config, logits=LOGITS[:1]):
    """Returns the share of each token in many draws of one row."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    many = jnp.broadcast_to(logits, (DRAWS, logits.shape[1]))
    tokens = _next_token(many, keys, config)
    return np.bincount(np.asarray(tokens), minlength=logits.shape[1]) / DRAWS


def test_temperature_zero_takes_the_likeliest():
    keys = jax.random.split(jax.random.key(0), 2)
    tokens = next_token(LOGITS, keys, SamplingConfig(temperature=0.0, top_p=0.5))
    np.testing.assert_array_equal(tokens, [0, 3])
    assert tokens.dtype == jnp.int32


def test_temperature_one_draws_from_the_softmax():
    np.testing.assert_allclose(_draws(SamplingConfig()), [0.5, 0.25, 0.15, 0.1], atol=0.03)


def test_temperature_sharpens():
    squares = np.array([0.5, 0.25, 0.15, 0.1]) ** 2
    found = _draws(SamplingConfig(temperature=0.5))
    np.testing.assert_allclose(found, squares / squares.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.95, 4), (1e-6, 1)]
)
def test_top_p_keeps_the_smallest_set_with_that_mass(top_p, kept):
    shares = np.array([0.5, 0.25, 0.15, 0.1])[:kept]
    found = _draws(SamplingConfig(top_p=top_p))
    np.testing.assert_array_equal(found[kept:], 0)
    np.testing.assert_allclose(found[:kept], shares / shares.sum(), atol=0.03)


def test_top_p_counts_mass_at_the_temperature():
    # At temperature 1/2 the first token alone has 0.72.
    found = _draws(SamplingConfig(temperature=0.5, top_p=0.7))
    np.testing.assert_array_equal(found, [1, 0, 0, 0])


@pytest.mark.parametrize(("top_k", "kept"), [(1, 1), (2, 2), (3, 3), (4, 4), (9, 4), (0, 4)])
def test_top_k_keeps_so_many(top_k, kept):
    shares = np.array([0.5, 0.25, 0.15, 0.1])[:kept]
    found = _draws(SamplingConfig(top_k=top_k))
    np.testing.assert_array_equal(found[kept:], 0)
    np.testing.assert_allclose(found[:kept], shares / shares.sum(), atol=0.03)


@pytest.mark.parametrize(("min_p", "kept"), [(1.0, 1), (0.49, 2), (0.29, 3), (0.19, 4)])
def test_min_p_is_a_share_of_the_likeliest(min_p, kept):
    found = _draws(SamplingConfig(min_p=min_p))
    assert (found > 0).sum() == kept


def test_a_token_must_pass_every_filter():
    found = _draws(SamplingConfig(top_k=3, top_p=0.74, min_p=0.2))
    np.testing.assert_array_equal(found > 0, [True, True, False, False])


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits = jnp.asarray([[2.0, 1.5, -1.0, -1.2], [2.0, 1.5, -1.0, -1.2]])
    seen = jnp.asarray([[True, False, True, False], [False, False, True, True]])
    config = SamplingConfig(temperature=0.0, repetition_penalty=1.5)
    keys = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_array_equal(_next_token(logits, keys, config, seen), [1, 0])
    np.testing.assert_array_equal(_next_token(logits, keys, config), [0, 0])
    negative = jnp.asarray([[-1.0, -1.2]])
    found = _next_token(negative, keys[:1], config, jnp.asarray([[True, False]]))
    np.testing.assert_array_equal(found, [1])


def test_a_row_s_draw_does_not_depend_on_the_others():
    keys = jax.random.split(jax.random.key(1), 8)
    logits = jnp.tile(LOGITS, (4, 1))
    together = _next_token(logits, keys, SamplingConfig())
    alone = _next_token(logits[5:6], keys[5:6], SamplingConfig())
    assert together[5] == alone[0]
    assert len(set(np.asarray(together).tolist())) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, but it must be from 1 to"),
        ({"temperature": -0.1}, "temperature is -0.1, but it must be 0 or positive"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0, but it must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k is -1, but it must be 0 or positive"),
        ({"min_p": 1.1}, "min_p is 1.1, but it must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, but it must be positive and"),
        ({"top_p": 1.5}, "top_p is 1.5, but it must be above 0 and at most 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        SamplingConfig(**settings)
