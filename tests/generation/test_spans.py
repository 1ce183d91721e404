"""Spans: what they leave out, on keys that make the most of it."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.errors import InputError
from lazyattn.generation import spans
from lazyattn.generation.cache import full_plan, in_bytes
from lazyattn.model.attention_layer import OPERANDS
from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.transformer import Transformer
from tests.model.tiny import make_config, make_params

QK_NORM = {"qk_norm": True}


def _bias_values(table, slope, length):
    """Returns b(x) of the distances 0 <= x < length."""
    beyond = np.arange(1, max(0, length - len(table)) + 1)
    tail = np.zeros(len(beyond)) if slope is None else table[-1] - slope * beyond
    return np.concatenate([table[:length], tail])


@pytest.mark.parametrize("slope", [None, 0.0, 0.4, 0.01, -0.02])
@pytest.mark.parametrize("bound", [0.5, 6.0])
def test_a_tail_counts_as_the_distances_it_stands_for(slope, bound):
    rng = np.random.default_rng(0)
    for length in (1, 5, 20, 21, 300, 3000):
        table = (rng.normal(size=20) - np.arange(20))[:length]
        whole = spans.span(_bias_values(table, slope, length), bound, 1e-4)
        assert spans.span(table, bound, 1e-4, slope=slope, length=length) == whole
    far = spans.span(np.array([0.0]), bound, 1e-4, slope=1e-3, length=10**12)
    assert 10_000 < far < 40_000


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("skip_mass", [1e-6, 1e-2])
def test_keys_at_the_norm_bound_hold_no_more_than_was_said(seed, skip_mass):
    """All keys past the span have the largest score there can be, all others the smallest."""
    config, length = make_config(attention=QK_NORM | {"rope": False}), 400
    params = make_params(config, seed)
    found = spans.head_spans(params, config, length, skip_mass=skip_mass)
    assert found.shape == (2, 4) and (found > 1).all() and (found < length).all()
    for layer, own in enumerate(spans._layers(params, config)):
        bias = spans.bias_arguments(own, config.attention)
        size = [
            np.sqrt(config.head_dim) * np.abs(np.float64(own[name]["scale"])).max()
            for name in ("query_norm", "key_norm")
        ]
        query = np.zeros(config.head_dim)
        query[0] = size[0]
        for head, span in enumerate(found[layer]):
            b = _bias_values(
                np.asarray(bias["distance_bias"][head], np.float64),
                float(bias["distance_slope"][head]),
                length,
            )

            def mass(span, b=b, query=query, size=size):
                key = np.zeros((length, config.head_dim))
                key[:, 0] = np.where(np.arange(length) >= span, size[1], -size[1])
                scores = key @ query / np.sqrt(config.head_dim) + b
                weights = np.exp(scores - scores.max())
                return weights[span:].sum() / weights.sum()

            assert mass(span) <= skip_mass
            assert mass(span // 2) > skip_mass


def test_real_keys_never_score_above_the_bound():
    config = make_config(attention=QK_NORM | {"num_kv_heads": 4})
    params = make_params(config, 5)
    (own, *_) = spans._layers(params, config)
    bound = spans.score_bound(own, config)
    scores = []
    rng = np.random.default_rng(0)
    for name in ("query_norm", "key_norm"):
        x = rng.normal(size=(500, config.head_dim)) ** 5  # most of it in one number
        x /= np.sqrt((x**2).mean(axis=-1, keepdims=True))
        scores.append(x * own[name]["scale"])
    largest = np.abs(scores[0] @ scores[1].T).max() / np.sqrt(config.head_dim)
    assert 0.9 * bound < largest <= bound


@pytest.mark.parametrize(
    ("length", "share"), [(4096, 0.34), (16_384, 0.115), (32_768, 0.057), (131_072, 0.014)]
)
def test_spans_at_initialization(length, share):
    """Sixteen heads with ALiBi's slopes and heads of 64, so that U is 8 nats."""
    config = ModelConfig(
        num_layers=1, compute_dtype="float32", attention=AttentionConfig(qk_norm=True)
    )
    slopes = 2.0 ** (-8 * (np.arange(16) + 1) / 16)
    attention = {
        "distance_delta": np.zeros((1, 16, 1024), np.float32),
        "distance_log_slope": np.log(slopes)[None].astype(np.float32),
        "offset": np.full((1, 16), -0.5, np.float32),
        **{n: {"scale": np.ones((1, 64), np.float32)} for n in ("query_norm", "key_norm")},
    }
    found = spans.head_spans({"blocks": {"attention": attention}}, config, length)
    assert found.mean() / length == pytest.approx(share, abs=0.006)


def test_what_can_be_forgotten_and_what_not():
    params = make_params(make_config(attention=QK_NORM))
    for attention, word in (
        ({}, "no qk_norm"),
        (QK_NORM | {"variant": "lazy_no_bias"}, "no distance bias"),
    ):
        config = make_config(attention=attention)
        own = make_params(config)
        assert word in spans.everything_kept(own, config)
        assert (spans.head_spans(own, config, 300) == 300).all()
    config = make_config(attention=QK_NORM)
    assert spans.everything_kept(params, config) is None
    params["blocks"]["attention"]["offset"] = jnp.asarray([[-0.5, 0.1, -1, -1], [0.2, 0, -1, -1]])
    found = spans.head_spans(params, config, 300)
    np.testing.assert_array_equal(found == 300, [[False, True, False, False], [True] + [False] * 3])
    params["blocks"]["attention"]["offset"] = jnp.full((2, 4), 0.1)
    assert "offsets are above 0" in spans.everything_kept(params, config)


def test_a_window_bounds_spans_without_qk_norm_too():
    config = make_config(attention={"window": 20, "global_share": 0.5})
    np.testing.assert_array_equal(
        spans.head_spans(make_params(config), config, 300), [[20, 20, 300, 300]] * 2
    )
    np.testing.assert_array_equal(spans.head_spans(make_params(config), config, 15), [[15] * 4] * 2)


@pytest.mark.parametrize("tail", [0.0, -0.1])
def test_a_bias_that_does_not_fall_keeps_all_or_what_the_length_leaves(tail):
    bias = _bias_values(np.zeros(4), tail, 50)
    assert spans.span(bias, 2.0, 1e-6) == 50
    rising = np.concatenate([-np.arange(30.0), [0.0], np.full(19, -60.0)])
    assert spans.span(rising, 2.0, 1e-6) == 31  # up to the last key that counts
    assert spans.span(np.array([-np.inf, 0, 0]), 2.0, 1e-6) == 3
    assert spans.span(np.array([0.0]), 2.0, 1e-6) == 1


def test_rounding_widens_the_bound():
    config = make_config(attention=QK_NORM)
    (own, *_) = spans._layers(make_params(config), config)
    exact = spans.score_bound(own, config)
    half = spans.score_bound(own, dataclasses.replace(config, compute_dtype="bfloat16"))
    assert exact < half < 1.02 * exact
    assert exact * 1.01 < spans.score_bound(own, config, quantized=True) < 1.1 * exact


def test_a_plan_has_the_longest_of_the_heads_that_share_keys():
    config = make_config(attention=QK_NORM, compute_dtype="bfloat16")
    params = make_params(config)
    own = spans.head_spans(params, config, 300, skip_mass=config.attention.skip_mass / 2)
    longest = own.reshape(2, 2, 2).max(axis=2) + 7
    buckets = (64, 80, 128)
    plan = spans.plan_cache(params, config, 300, buckets=buckets)
    for layer, groups in zip(longest, plan.layers, strict=True):
        slots = {head: group.slots for group in groups for head in group.heads}
        for head, needed in enumerate(layer):
            assert slots[head] == min((n for n in buckets if n >= needed), default=300)
    assert plan.length == 300 and plan.skip_mass == config.attention.skip_mass / 2
    kept = sum(group.slots * len(group.heads) for layer in plan.layers for group in layer)
    assert kept < 4 * 300
    assert plan.row_bytes == pytest.approx(kept * 2 * 2 * 4, rel=0.1)
    said = spans.describe(plan, 2)
    assert said.startswith(in_bytes(2 * plan.row_bytes) + " for 2 rows of 300 tokens, bfloat16")
    assert f"{kept / 1200:.1%} of all keys" in said
    # Buckets that are no shorter than the cache are of no use.
    short = spans.plan_cache(params, config, 60, buckets=buckets)
    assert short == dataclasses.replace(full_plan(config, 60), skip_mass=plan.skip_mass)


@pytest.mark.parametrize("buckets", [(7, 64), (64, 64), (128, 64)])
def test_bad_buckets(buckets):
    config = make_config(attention=QK_NORM)
    with pytest.raises(InputError, match=r"bucket lengths .* are \[.*\], but they must be above 7"):
        spans.plan_cache(make_params(config), config, 300, buckets=buckets)


def test_best_lengths_hold_the_fewest_keys():
    def held(needed, lengths):
        return sum(min(n for n in (*lengths, 1024) if n >= min(keys, 1024)) for keys in needed)

    needed = [10, 100, 129, 130, 300, 500, 700, 900, 5000]
    choices = itertools.chain(*(itertools.combinations(range(128, 1024, 128), n) for n in range(3)))
    least = min(held(needed, lengths) for lengths in choices)
    found = spans.best_lengths(needed, 1024, number=3)
    assert len(found) == 2 and held(needed, found) == least
    assert spans.best_lengths([1, 2], 1024) == (128,)
    assert spans.best_lengths([2000], 1024) == ()


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_models_own_queries_and_keys_are_within_the_bound(dtype):
    """Rounding to bfloat16 makes some of them longer than the norms' scales allow."""
    config = make_config(attention=QK_NORM, compute_dtype=dtype, scan_layers=False)
    params = make_params(config, 2)
    inputs = jnp.asarray(np.random.default_rng(0).integers(31, size=(2, 40)))
    apply = jax.jit(functools.partial(Transformer(config).apply, mutable=[OPERANDS]))
    _, state = apply({"params": params}, inputs)
    for layer, own in enumerate(spans._layers(params, config)):
        operands = state[OPERANDS][f"blocks_{layer}"]["attention"]["operands"]
        query, key = (np.asarray(operands[n], np.float64) for n in ("query", "key"))
        longest = [np.linalg.norm(x, axis=-1).max() for x in (query, key)]
        bound = spans.score_bound(own, config)
        assert 0.5 * bound < np.prod(longest) / np.sqrt(config.head_dim) <= bound
