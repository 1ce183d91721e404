"""Prefill, chunks, steps: what each says of the next token is what one pass over all says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.errors import InputError
from lazyattn.generation.cache import CacheOptions, check_memory, full_plan, init_cache
from lazyattn.generation.decode import generate
from lazyattn.generation.prepared import prepare
from lazyattn.generation.sampling import SamplingConfig
from lazyattn.generation.serving import NO_TOKEN, decode_step, extend, free, prefill, rewind
from lazyattn.generation.spans import plan_cache
from lazyattn.model.transformer import Transformer, logits, output_embedding
from tests.model.tiny import VOCAB, make_config, make_params

LENGTH = 160
TOKENS = np.random.default_rng(1).integers(VOCAB, size=(3, LENGTH))
QK_NORM = {"qk_norm": True, "skip_mass": 1e-4}


@functools.cache
def _params(config):
    return make_params(config)


@functools.partial(jax.jit, static_argnums=0)
def _forced(config, params, tokens):
    """Returns the logits of every position, computed at once."""
    hidden = Transformer(config).apply({"params": params}, tokens)
    return logits(hidden, output_embedding(params, config))


def _spans(config, dtype="compute"):
    plan = plan_cache(_params(config), config, LENGTH, dtype=dtype, buckets=(32, 72))
    assert any(group.slots < LENGTH for layer in plan.layers for group in layer)
    return plan


FULL = {
    "softmax": make_config("softmax", attention={"num_kv_heads": 4}, scan_layers=False),
    "lazy_renormalized": make_config("lazy_renormalized", compute_dtype="float32"),
    "window": make_config(attention={"global_share": 0.5, "global_rope": False, "window": 30}),
}
SPANS = {
    "spans": make_config(attention=QK_NORM),
    "spans_of_a_window": make_config(attention=QK_NORM | {"global_share": 0.5, "window": 15}),
}
PLANS = {
    **{name: functools.partial(full_plan, config, LENGTH) for name, config in FULL.items()},
    **{name: functools.partial(_spans, config) for name, config in SPANS.items()},
    "int8": functools.partial(full_plan, SPANS["spans"], LENGTH, dtype="int8"),
    "int8_spans": functools.partial(_spans, SPANS["spans"], "int8"),
}


@pytest.mark.parametrize(
    "name",
    [name if name == "spans" else pytest.param(name, marks=pytest.mark.slow) for name in PLANS],
)
def test_logits_are_those_of_one_pass(name):
    config = (FULL | SPANS).get(name, SPANS["spans"])
    plan, params = PLANS[name](), _params(config)
    wanted = np.asarray(_forced(config, params, TOKENS))
    model, cache = prepare(params, config), init_cache(plan, 3)
    bound = 0.15 if plan.quantized else 2e-4
    errors = []

    def compare(found, at):
        """Checks the logits after position at[b] of each row."""
        errors.append(np.abs(np.asarray(found) - wanted[np.arange(3), at]).max())
        assert errors[-1] <= bound, errors

    lengths = np.array([90, 7, 1])
    found, cache = prefill(model, cache, TOKENS[:, :100], lengths)
    compare(found, lengths - 1)
    rows = np.arange(3)[:, None]
    # Chunks, longer and shorter than rings.
    for chunk in ([20, 30, 40], [1, 40, 17]):
        tokens = TOKENS[rows, lengths[:, None] + np.arange(40)]
        found, cache = extend(model, cache, tokens, chunk)
        lengths = lengths + chunk
        compare(found, lengths - 1)
    for _ in range(3):
        found, cache = decode_step(model, cache, TOKENS[rows[:, 0], lengths])
        compare(found, lengths)
        lengths = lengths + 1
    for _ in range(4):
        tokens = TOKENS[rows, lengths[:, None] + np.arange(8)]
        found, cache = decode_step(model, cache, tokens)
        for i in range(8):
            compare(found[:, i], lengths + i)
        # Three of the eight are turned down, and come again.
        cache = rewind(cache, [3, 3, 3])
        lengths = lengths + 5
    np.testing.assert_array_equal(cache.lengths, lengths)
    if plan.quantized:
        assert max(errors) > 1e-3


def _model():
    config = SPANS["spans"]
    return config, prepare(_params(config), config), init_cache(_spans(config), 3)


# The shapes below are those of the tests above, so that little is compiled.
def test_requests_come_and_go_and_others_notice_nothing():
    config, model, cache = _model()
    wanted = np.asarray(_forced(config, _params(config), TOKENS))
    _, cache = prefill(model, cache, TOKENS[:, :100], [100, 60, 3])
    cache = free(cache, 1)
    np.testing.assert_array_equal(cache.lengths, [100, 0, 3])
    # Row 1 is idle: its token is none.
    found, cache = decode_step(model, cache, [TOKENS[0, 100], NO_TOKEN, TOKENS[2, 3]])
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[0], wanted[0, 100], rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(found[2], wanted[2, 3], rtol=2e-4, atol=2e-4)
    # Another document takes its place, and the place of row 0.
    new = TOKENS[[2, 1], :100]
    found, cache = prefill(model, cache, new, [30, 44], rows=[1, 0])
    np.testing.assert_allclose(found, wanted[[2, 1], [29, 43]], rtol=2e-4, atol=2e-4)
    np.testing.assert_array_equal(cache.lengths, [44, 30, 4])
    found, cache = decode_step(model, cache, [TOKENS[1, 44], TOKENS[2, 30], TOKENS[2, 4]])
    np.testing.assert_allclose(found, wanted[[1, 2, 2], [44, 30, 4]], rtol=2e-4, atol=2e-4)
    # A few tokens to one row only.
    several = np.full((3, 8), NO_TOKEN)
    several[1, :2] = TOKENS[2, 31:33]
    found, cache = decode_step(model, cache, several)
    np.testing.assert_allclose(found[1, :2], wanted[2, 31:33], rtol=2e-4, atol=2e-4)
    assert np.isnan(found[0]).all() and np.isnan(found[2]).all() and np.isnan(found[1, 2:]).all()
    np.testing.assert_array_equal(cache.lengths, [45, 33, 5])


def test_no_step_copies_the_cache():
    _, model, cache = _model()
    _, cache = prefill(model, cache, TOKENS[:, :100], [100, 60, 3])

    def places(cache):
        return {x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache.layers)}

    before = places(cache)
    for tokens in (TOKENS[:, 0], TOKENS[:, 1], TOKENS[:, :8]):
        _, cache = decode_step(model, cache, tokens)
        assert places(cache) == before
    _, cache = prefill(model, cache, TOKENS[:2, :100], [70, 9], rows=[2, 0])
    assert places(cache) == before
    assert places(free(cache, 0)) == before


def test_a_row_without_room_is_left_as_it_was():
    _, model, cache = _model()
    _, cache = prefill(model, cache, TOKENS[:, :100], [100, 99, 5])
    for chunk in ([40, 40, 0], [20, 20, 0]):
        _, cache = extend(model, cache, TOKENS[:, :40], chunk)
    np.testing.assert_array_equal(cache.lengths, [LENGTH, LENGTH - 1, 5])
    before = jax.device_get(cache.layers)
    found, cache = decode_step(model, cache, [1, 2, 3])
    assert np.isnan(found[0]).all() and np.isfinite(found[1:]).all()
    np.testing.assert_array_equal(cache.lengths, [LENGTH, LENGTH, 6])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(cache.layers), strict=True):
        np.testing.assert_array_equal(old[0], new[0])
    found, cache = extend(model, cache, TOKENS[:, :40], [1, 2, 9])
    assert np.isnan(found[:2]).all() and np.isfinite(found[2]).all()
    np.testing.assert_array_equal(cache.lengths, [LENGTH, LENGTH, 15])


@pytest.mark.slow
def test_greedy_tokens_with_spans_are_those_of_one_pass():
    """The version of 10,000 tokens is `test_long.py`."""
    config = SPANS["spans"]
    lengths = np.array([70, 30, 2])
    new = generate(
        prepare(_params(config), config),
        config,
        TOKENS[:, :70],
        lengths,
        sampling=SamplingConfig(max_new_tokens=90, temperature=0.0),
        key=jax.random.key(0),
        plan=_spans(config),
    )
    whole = TOKENS.copy()
    for row, length, tokens in zip(whole, lengths, np.asarray(new.tokens), strict=True):
        row[length : length + 90] = tokens
    scores = np.asarray(_forced(config, _params(config), whole))
    for row, length, tokens in zip(scores, lengths, np.asarray(new.tokens), strict=True):
        before = row[length - 1 : length + 89]
        chosen = before[np.arange(90), tokens]
        np.testing.assert_allclose(chosen, before.max(axis=-1), rtol=2e-4, atol=2e-4)
    # Tokens that are not all the same, or this shows nothing.
    assert len(np.unique(new.tokens)) > 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, c: prefill(m, c, np.ones((3, 200), int), [3, 161, 2]),
            "the longest prompt's length is 161, but it must be at most 160",
        ),
        (
            lambda m, c: prefill(m, c, TOKENS[:2], [3, 1]),
            "the number of prompts is 2, but it must be 3",
        ),
        (lambda m, c: prefill(m, c, TOKENS, [3, 0, 1]), "A length is 0, .* from 1 to 160"),
        (lambda m, c: prefill(m, c, TOKENS, [3, 1]), r"lengths' shape is \(2,\), .* \(3,\)"),
        (lambda m, c: prefill(m, c, TOKENS[0], [3]), r"tokens' shape is \(160,\)"),
        (lambda m, c: prefill(m, c, TOKENS * 1.0, [3] * 3), "tokens' dtype is 'float64'"),
        (lambda m, c: prefill(m, c, TOKENS[:2], [3, 4], [1, 1]), r"rows is \[1, 1\], .* 0 to 2"),
        (lambda m, c: prefill(m, c, TOKENS[:2], [3, 4], [1, 3]), r"rows is \[1, 3\]"),
        (lambda m, c: prefill(m, c, TOKENS[:2], [3, 4], [1]), r"rows' shape is \(1,\), .* \(2,\)"),
        (lambda m, c: extend(m, c, TOKENS[:2], [3, 4]), "rows of tokens is 2, .* must be 3"),
        (
            lambda m, c: decode_step(m.params, c, TOKENS[:, 0]),
            r"model is 'dict', but it must be what prepare\(params, config\) returns",
        ),
        (lambda m, c: SamplingConfig(max_new_tokens=10**10), "it must be from 1 to 2..30"),
        (lambda m, c: CacheOptions("full", buckets=(256,)), "must be spans with --cache_buckets"),
        (lambda m, c: decode_step(m, c, TOKENS[:, :9]), "a step is 9, .* from 1 to 8"),
        (lambda m, c: decode_step(m, c, TOKENS[:2, 0]), "rows of tokens is 2, .* must be 3"),
        (lambda m, c: init_cache(c.plan, 0), "the cache's rows is 0, but it must be at least 1"),
        (
            lambda m, c: check_memory(c.plan, 10**9, 10**9),
            r"cache of 1,000,000,000 rows of 160 tokens takes .* TB, .* at most 1 GB, the memory",
        ),
        (
            lambda m, c: prefill(m, c, np.full((3, 2), -1), [2, 2, 2]),
            "a token is -1, but it must be from 0 to 30",
        ),
        (
            lambda m, c: decode_step(m, c, np.full(3, 99)),
            "a token is 99, but it must be from -1 to 30",
        ),
        (lambda m, c: free(c, [0, 3]), r"rows is \[0, 3\], but it must be from 0 to 2"),
        (lambda m, c: rewind(c, [1, 8, 0]), r"count is \[1, 8, 0\], but it must be from 0 to 7"),
        (lambda m, c: rewind(c, [1]), r"count's shape is \(1,\), but it must be \(3,\), one for"),
        (
            lambda m, c: full_plan(make_config(), 9, dtype="int4"),
            "the cache's dtype is 'int4', but it must be compute or int8",
        ),
    ],
)
def test_bad_inputs(call, message):
    config = SPANS["spans"]
    model, cache = prepare(_params(config), config), init_cache(full_plan(config, LENGTH), 3)
    with pytest.raises(InputError, match=message):
        call(model, cache)
    assert all(not x.is_deleted() for x in jax.tree.leaves(cache))


def test_a_model_is_prepared_once():
    config = SPANS["spans"]
    model = prepare(_params(config), config)
    assert prepare(model, config) is model
    half = prepare(_params(config), dataclasses.replace(config, compute_dtype="bfloat16"))
    block = half.params["blocks_1"]
    assert block["attention"]["query"].dtype == block["mlp"]["gate_up"].dtype == jnp.bfloat16
    assert half.output.dtype == jnp.bfloat16
    assert block["attention"]["distance_bias"].dtype == jnp.float32
    assert half.params["embedding"].dtype == jnp.float32


@pytest.mark.slow
def test_steps_within_a_program_are_those_of_generate():
    config = SPANS["spans"]
    model, new = prepare(_params(config), config), 8
    plan, prompts, lengths = _spans(config), TOKENS[:, :9], np.array([9, 4, 1])

    @functools.partial(jax.jit, donate_argnums=1)
    def several(model, cache, tokens):
        def one(state, _):
            logits, cache = decode_step(model, state[0], state[1])
            return (cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)), state[1]

        return jax.lax.scan(one, (cache, tokens), length=new)

    logits, cache = prefill(model, init_cache(plan, 3), prompts, lengths)
    _, drawn = several(model, cache, jnp.argmax(logits, axis=-1).astype(jnp.int32))
    greedy = SamplingConfig(max_new_tokens=new, temperature=0.0)
    how = {"sampling": greedy, "key": jax.random.key(0), "plan": plan}
    true = generate(model, config, prompts, lengths, **how)
    np.testing.assert_array_equal(drawn.T, true.tokens)
