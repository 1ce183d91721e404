import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.errors import InputError
from lazyattn.generation import decode
from lazyattn.generation.cache import full_plan, init_cache
from lazyattn.generation.decode import generate
from lazyattn.generation.prepared import prepare
from lazyattn.generation.sampling import SamplingConfig
from lazyattn.generation.serving import decode_step, prefill
from lazyattn.model.transformer import Transformer, logits, output_embedding
from tests.model.tiny import VOCAB, make_config, make_params

CONFIG = make_config()
KEY = jax.random.key(0)
LENGTHS = np.array([3, 7, 1])
PROMPTS = np.random.default_rng(0).integers(VOCAB, size=(3, 8))
GREEDY = SamplingConfig(max_new_tokens=6, temperature=0.0)


@functools.cache
def _params(config=CONFIG):
    return make_params(config)


@functools.partial(jax.jit, static_argnums=0)
def _forced(config, params, tokens, segment_ids=None):
    """Returns the logits of every position, computed at once."""
    hidden = Transformer(config).apply({"params": params}, tokens, segment_ids)
    return logits(hidden, output_embedding(params, config))


VARIANTS = [
    # Greedy tokens below are those of its logits.
    pytest.param(CONFIG, marks=pytest.mark.slow),
    pytest.param(
        make_config("lazy_length_offset", attention={"num_kv_heads": 1, "qk_norm": True}),
        marks=pytest.mark.slow,
    ),
    pytest.param(make_config("biased_softmax", lora_rank=2), marks=pytest.mark.slow),
    # One that cannot decode: with a cache another takes its place.
    make_config(
        "softmax",
        attention={"num_kv_heads": None, "implementation": "xla_chunked"},
        scan_layers=False,
    ),
    # Global heads see all of the cache, local ones its end.
    make_config(
        attention={
            "global_share": 0.5,
            "global_rope": False,
            "window": 3,
            "output_gate": True,
            "qkv_bias": True,
        }
    ),
]


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: c.attention.variant)
def test_cached_logits_are_those_of_one_pass(config):
    params = _params(config)
    tokens = jnp.asarray(np.random.default_rng(1).integers(VOCAB, size=(3, 12)))
    expected = _forced(config, params, tokens)
    # Room for 12 tokens, which lazy_length_offset takes for the context length.
    model, cache = prepare(params, config), init_cache(full_plan(config, 12), 3)
    rows = jnp.arange(3)
    found, cache = prefill(model, cache, tokens[:, :8], LENGTHS)
    np.testing.assert_allclose(found, expected[rows, LENGTHS - 1], rtol=1e-4, atol=1e-4)
    # Each row goes on from its own length.
    for step in range(4):
        at = LENGTHS + step
        found, cache = decode_step(model, cache, tokens[rows, at])
        np.testing.assert_allclose(found, expected[rows, at], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(cache.lengths, LENGTHS + 4)


@pytest.mark.parametrize(
    "config",
    [VARIANTS[0], pytest.param(VARIANTS[3], marks=pytest.mark.slow), VARIANTS[4]],
    ids=lambda c: c.attention.variant,
)
def test_cached_logits_are_those_of_packed_documents(config):
    """A row of the cache is one document; a training row packs them all."""
    params = _params(config)
    lengths = [5, 9, 4]
    rng = np.random.default_rng(2)
    documents = [rng.integers(VOCAB, size=n) for n in lengths]
    packed = jnp.asarray(np.concatenate(documents), jnp.int32)[None]
    segment_ids = jnp.asarray(np.repeat([1, 2, 3], lengths), jnp.int32)[None]
    expected = np.split(_forced(config, params, packed, segment_ids)[0], np.cumsum(lengths)[:-1])
    padded = np.zeros((3, 9), np.int32)
    for row, document in zip(padded, documents, strict=True):
        row[: len(document)] = document
    model, cache = prepare(params, config), init_cache(full_plan(config, 12), 3)
    found, cache = prefill(model, cache, padded[:, :2], [2, 2, 2])
    for row, wanted in enumerate(expected):
        np.testing.assert_allclose(found[row], wanted[1], rtol=1e-4, atol=1e-4)
    for step in range(2, 9):
        found, cache = decode_step(model, cache, padded[:, step])
        for row, wanted in enumerate(expected):
            if step < lengths[row]:
                np.testing.assert_allclose(found[row], wanted[step], rtol=1e-4, atol=1e-4)


def _greedy_by_hand(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(tokens)] = tokens
        scores = _forced(CONFIG, _params(), jnp.asarray(padded))[0, len(tokens) - 1]
        tokens.append(int(np.argmax(scores)))
    return tokens[len(prompt) :]


@functools.cache
def _by_hand():
    return [_greedy_by_hand(row[:n], 6) for row, n in zip(PROMPTS, LENGTHS, strict=True)]


def test_greedy_continuations_of_unequal_prompts():
    new = generate(_params(), CONFIG, PROMPTS, LENGTHS, sampling=GREEDY, key=KEY)
    np.testing.assert_array_equal(new.tokens, _by_hand())
    np.testing.assert_array_equal(new.lengths, 6)
    assert new.tokens.dtype == jnp.int32


@pytest.mark.parametrize("padding", [0, pytest.param(5, marks=pytest.mark.slow)])
def test_rows_end_at_the_end_of_sequence_token_however_padded(padding):
    eos = _by_hand()[1][2]
    expected = [(row[: row.index(eos)] if eos in row else row) for row in _by_hand()]
    padded = np.concatenate([PROMPTS, np.full((3, padding), 7)], axis=1)
    new = generate(
        _params(),
        CONFIG,
        padded,
        LENGTHS,
        sampling=GREEDY,
        key=KEY,
        eos_id=eos,
        cache_length=13 if padding else None,
    )
    np.testing.assert_array_equal(new.lengths, [len(row) for row in expected])
    for row, wanted in zip(np.asarray(new.tokens), expected, strict=True):
        np.testing.assert_array_equal(row, wanted + [0] * (6 - len(wanted)))


@pytest.mark.slow
def test_a_token_that_is_penalized_enough_never_comes_twice():
    # Nothing but the row's own tokens counts, so the padding's id may come.
    sampling = dataclasses.replace(GREEDY, max_new_tokens=12, repetition_penalty=1e6)
    padding = int(_by_hand()[0][0])
    prompts = np.concatenate([PROMPTS, np.full((3, 2), padding)], axis=1)
    new = generate(_params(), CONFIG, prompts, LENGTHS, sampling=sampling, key=KEY)
    for prompt, length, tokens in zip(prompts, LENGTHS, np.asarray(new.tokens), strict=True):
        row = [*prompt[:length], *tokens]
        assert len(set(row)) == len(set(row[:length])) + 12
    if padding not in PROMPTS[0, : LENGTHS[0]]:
        assert new.tokens[0, 0] == padding


def test_draws_depend_on_the_key_and_not_on_other_rows_or_padding():
    sampling = SamplingConfig(max_new_tokens=6, temperature=1.5, top_p=0.95)
    run = functools.partial(generate, _params(), CONFIG, sampling=sampling)
    tokens = run(PROMPTS, LENGTHS, key=KEY).tokens
    np.testing.assert_array_equal(run(PROMPTS, LENGTHS, key=KEY).tokens, tokens)
    others = PROMPTS.copy()
    others[1:] = (others[1:] + 3) % VOCAB
    others[0, LENGTHS[0] :] = 1
    changed = run(others, np.array([LENGTHS[0], 2, 8]), key=KEY).tokens
    np.testing.assert_array_equal(changed[0], tokens[0])
    assert np.any(changed[1:] != tokens[1:])
    assert np.any(run(PROMPTS, LENGTHS, key=jax.random.key(1)).tokens != tokens)


def test_the_program_does_not_grow_with_the_tokens_it_makes():
    def program(count):
        model = prepare(_params(), CONFIG)
        arguments = (model, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), KEY, jnp.asarray(1))
        sampling = SamplingConfig(max_new_tokens=count)
        plan = full_plan(CONFIG, 200)
        traced = decode._generate.trace(*arguments, sampling=sampling, plan=plan)
        return str(traced.jaxpr).count("dot_general")

    assert program(4) == program(100) > 0


def test_other_prompts_and_keys_do_not_compile_again():
    generate(_params(), CONFIG, PROMPTS, LENGTHS, sampling=GREEDY, key=KEY)
    before = decode._generate._cache_size()
    other = {"key": jax.random.key(9), "eos_id": 5, "sampling": GREEDY}
    generate(_params(), CONFIG, (PROMPTS + 1) % VOCAB, LENGTHS[::-1], **other)
    assert decode._generate._cache_size() == before


def test_the_cache_is_in_the_compute_dtype():
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    cache = init_cache(full_plan(config, 5), 2)
    assert len(cache.layers) == 2
    for (group,) in cache.layers:
        assert group.keys.shape == group.values.shape == (2, 5, 2, 4)
        assert group.keys.dtype == group.values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(cache.lengths, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": PROMPTS[0]}, r"prompts' shape is \(8,\), .* \[batch, length\]"),
        ({"prompts": PROMPTS * 1.0}, "prompts' dtype is 'float64', but it must be an integer"),
        ({"prompt_lengths": LENGTHS[:2]}, r"prompt_lengths' shape is \(2,\), .* \(3,\)"),
        ({"prompt_lengths": np.array([3, 0, 1])}, "A prompt is empty"),
        ({"prompt_lengths": np.array([3, 9, 1])}, "prompt_lengths is 9, .* at most 8"),
        ({"prompts": PROMPTS + VOCAB}, f"a token of prompts is .* from 0 to {VOCAB - 1}"),
        ({"prompts": PROMPTS - 99}, f"a token of prompts is -.* from 0 to {VOCAB - 1}"),
        (
            {"cache_length": 12},
            "the longest prompt's length is 7, but it must be at most 6: the cache has room for 12",
        ),
        ({"cache_length": 0}, "the longest prompt's length is 7"),
    ],
)
def test_bad_inputs(change, message):
    arguments = {"prompts": PROMPTS, "prompt_lengths": LENGTHS, **change}
    with pytest.raises(InputError, match=message):
        generate(_params(), CONFIG, **arguments, sampling=GREEDY, key=KEY)


def test_bad_cache_length():
    with pytest.raises(InputError, match="cache_length is 0, but it must be at least 1"):
        full_plan(CONFIG, 0)
