"""Contexts of 16,384 tokens on a CPU: minutes, so all slow."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.generation import (
    SamplingConfig,
    extend,
    full_plan,
    generate,
    init_cache,
    plan_cache,
    prefill,
    prepare,
    serving,
)
from tests.model.tiny import VOCAB, make_config, make_params

LENGTH = 16_384
CONFIG = make_config(
    attention={"qk_norm": True, "num_kv_heads": 4, "head_dim": 16, "bias_width": 64}, width=32
)
TOKENS = np.random.default_rng(0).integers(VOCAB, size=(1, LENGTH))

pytestmark = pytest.mark.slow


@functools.cache
def _params():
    params = make_params(CONFIG)
    # From a head that needs a few tokens to one that needs thousands.
    slopes = np.log([[0.3, 0.03, 0.01, 0.004]] * 2)
    params["blocks"]["attention"]["distance_log_slope"] = jnp.asarray(slopes, jnp.float32)
    return params


def test_memory_of_a_prompt_is_linear_in_its_length():
    """The scores of one head alone would be 1 GB at this length."""
    model = prepare(_params(), CONFIG)

    def bytes_of(length):
        cache = jax.eval_shape(lambda: init_cache(full_plan(CONFIG, length), 1))
        shapes = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        found = serving._prefill.lower(model, cache, *shapes, None).compile()
        found = found.memory_analysis().temp_size_in_bytes
        chunk = jax.ShapeDtypeStruct((1, 512), jnp.int32), shapes[1]
        extended = serving._extend.lower(model, cache, *chunk).compile()
        return np.array([found, extended.memory_analysis().temp_size_in_bytes])

    short, long = bytes_of(LENGTH // 2), bytes_of(LENGTH)
    print("prefill and extend, bytes:", short, long)
    assert (long < 2.2 * short).all() and (long < 2e8).all()


def test_a_prompt_in_chunks_is_the_prompt_at_once():
    model = prepare(_params(), CONFIG)
    full, spans = full_plan(CONFIG, LENGTH), plan_cache(_params(), CONFIG, LENGTH)
    assert len({group.slots for group in spans.layers[0]}) > 2
    wanted, cache = prefill(model, init_cache(full, 1), TOKENS[:, :-384], [LENGTH - 384])
    wanted, _ = extend(model, cache, TOKENS[:, -384:], [384])
    for plan in (full, spans):
        cache = init_cache(plan, 1)
        for start in range(0, LENGTH, 4096):
            found, cache = extend(model, cache, TOKENS[:, start : start + 4096], [4096])
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_ten_thousand_greedy_tokens_are_the_same_with_spans():
    model, new = prepare(_params(), CONFIG), 10_000
    run = functools.partial(
        generate,
        model,
        CONFIG,
        TOKENS[:, : LENGTH - new],
        np.array([LENGTH - new]),
        sampling=SamplingConfig(max_new_tokens=new, temperature=0.0, repetition_penalty=1.05),
        key=jax.random.key(0),
    )
    tokens = {}
    for name, plan in (
        ("full", full_plan(CONFIG, LENGTH)),
        ("spans", plan_cache(_params(), CONFIG, LENGTH)),
    ):
        start = time.perf_counter()
        tokens[name] = np.asarray(run(plan=plan).tokens)
        print(name, f"{time.perf_counter() - start:.0f} s")
    print("tokens that differ:", int((tokens["full"] != tokens["spans"]).sum()))
    print("different tokens among them:", len(np.unique(tokens["full"])))
    np.testing.assert_array_equal(tokens["spans"], tokens["full"])
    assert len(np.unique(tokens["full"])) > 5
