"""The TPU decode kernel in Pallas's TPU interpret mode: races detected, memory starting as NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn import InputError, compile_for, decode_attention
from lazyattn.generation.cache import full_plan, init_cache
from lazyattn.generation.prepared import prepare
from lazyattn.generation.serving import step_rows
from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.parameters import parameter_shapes
from pallas_kernels.decode import tpu
from tests.pallas_kernels import tpu_interpreter
from tests.pallas_kernels.decode import append, suite

# What runs by default, each some CPU seconds; `make test-tpu` has all.
QUICK = {"ring_of_many", "int8"}


def _marked(names):
    return [
        x if getattr(getattr(x, "case", None), "name", x) in QUICK
        else pytest.param(x, marks=pytest.mark.slow)
        for x in names
    ]  # fmt: skip


@pytest.fixture
def interpreted(monkeypatch):
    """Makes chunks small, so that a row has several, some of which overlap."""
    monkeypatch.setattr(tpu, "CHUNK_PAGES", 2)
    with tpu_interpreter.interpreted():
        yield


@pytest.mark.parametrize("decode", _marked(suite.EVERY), ids=str)
def test_output(decode, interpreted):
    suite.check("tpu", decode)


@pytest.mark.parametrize("check", _marked(suite.CHECKS))
def test_as_every_backend(check, interpreted):
    suite.CHECKS[check]("tpu")


@pytest.mark.parametrize(
    "decode", [suite.SPARSE[1], pytest.param(suite.SPARSE[0], marks=pytest.mark.slow)], ids=str
)
def test_unread_pages_do_not_matter(decode, interpreted):
    suite.check_unread_pages_do_not_matter("tpu", decode, pages=2, rows_together=False)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_append(dtype):
    with tpu_interpreter.interpreted():
        append.check(dtype, slots=(384, 128, 256))


def test_generation_takes_it_where_a_tpu_is_compiled_for():
    attention = AttentionConfig(num_heads=2, head_dim=64, qk_norm=True)
    config = ModelConfig(width=128, num_layers=1, vocab_size=64, attention=attention)
    plan = full_plan(config, 512)

    def step(params, cache, tokens):
        return step_rows(prepare(params, config), cache, tokens)

    params = parameter_shapes(config)
    cache = jax.eval_shape(lambda: init_cache(plan, 2))
    tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    with compile_for("v5p"):
        traced = jax.jit(step).trace(params, cache, tokens)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    for kernel in ("lazy_append", "lazy_own_keys", "lazy_decode"):
        assert text.count(f'kernel_name = "{kernel}"') == 1, kernel


def test_what_is_refused_by_name():
    args, _ = suite.arrays(suite.SPARSE[0])
    with pytest.raises(InputError, match="it needs a TPU and JAX runs on"):
        suite.run(args, "tpu")
    with compile_for("v4"):
        with pytest.raises(InputError, match="inputs are float16"):
            decode_attention(**_shapes(1, 1024, "float16"), implementation="tpu")
        with pytest.raises(InputError, match="of VMEM, above"):
            decode_attention(**_shapes(8, 2**17, "bfloat16"), implementation="tpu")


def _shapes(new, slots, dtype):
    cache = np.broadcast_to(np.zeros((), jnp.dtype(dtype)), (1, slots, 1, 64))
    query = np.zeros((1, new, 4, 64), cache.dtype)
    lengths = np.array([slots], np.int32)
    return {"query": query, "key_cache": cache, "value_cache": cache, "lengths": lengths}
