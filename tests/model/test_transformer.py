import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn import compile_for
from lazyattn.errors import InputError
from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.objective import make_loss_fn
from lazyattn.model.parameters import parameter_shapes, stack_blocks, unstack_blocks
from lazyattn.model.transformer import Transformer, logits, output_embedding
from tests.model.tiny import VOCAB, make_batch, make_config, make_params

CONFIG = make_config()
BATCH = make_batch()
WHOLE = {"inputs": BATCH["inputs"], "segment_ids": jnp.ones((2, 11), jnp.int32)}


# Always with segment ids, for one compilation to do for many tests.
@functools.partial(jax.jit, static_argnums=0)
def _hidden(config, params, inputs, segment_ids, positions=None):
    return Transformer(config).apply({"params": params}, inputs, segment_ids, positions)


def _score(config, params):
    hidden = Transformer(config).apply({"params": params}, BATCH["inputs"], BATCH["segment_ids"])
    wave = jnp.sin(jnp.arange(hidden.size, dtype=jnp.float32)).reshape(hidden.shape)
    return jnp.mean(hidden * wave)


_value_and_grad = jax.jit(jax.value_and_grad(_score, argnums=1), static_argnums=0)


@functools.cache
def _expected():
    params = make_params(CONFIG)
    return params, *_value_and_grad(CONFIG, params)


def _assert_close(found, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


def test_every_parameter_has_a_gradient():
    # The unembedding comes after the hidden states.
    _, _, gradient = _expected()
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.any(leaf != 0) == (path[-1].key != "unembedding"), path


def _assert_same_function(config, params, stack=lambda params: params):
    _, value, gradient = _expected()
    found, found_gradient = _value_and_grad(config, params)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    _assert_close(stack(found_gradient), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("remat", ["dots", "attention"])
def test_remat_of_some_changes_no_gradient(remat):
    _assert_same_function(dataclasses.replace(CONFIG, remat=remat), _expected()[0])


def test_unrolled_and_fully_recomputed_layers_are_the_same_function():
    config = dataclasses.replace(CONFIG, scan_layers=False, remat="full")
    _assert_same_function(config, unstack_blocks(_expected()[0]), stack_blocks)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_remat_keeps_less_for_the_backward_pass(scan):
    def kept(remat):
        attention = dataclasses.replace(CONFIG.attention, implementation="xla_chunked")
        config = dataclasses.replace(CONFIG, remat=remat, scan_layers=scan, attention=attention)
        residuals = jax.eval_shape(
            lambda params: jax.vjp(functools.partial(_score, config), params)[1],
            make_params(config),
        )
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(residuals))

    assert kept("full") < kept("attention") < kept("dots") < kept("none")


@pytest.mark.parametrize(
    ("remat", "runs"), [("none", 1), ("dots", 1), ("attention", 1), ("full", 2)]
)
def test_remat_runs_the_forward_kernel_once(remat, runs):
    attention = AttentionConfig(num_heads=1, implementation="mosaic_gpu")
    config = ModelConfig(64, 64, num_layers=2, remat=remat, attention=attention)
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    batch = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), tokens)
    loss = make_loss_fn(config)
    with compile_for("sm90"):
        gradient = jax.make_jaxpr(jax.grad(lambda params, batch: loss(params, batch).objective))
        text = str(gradient(parameter_shapes(config), batch))
    assert text.count("lazy_forward") == runs * text.count("lazy_backward_dq")


def test_bfloat16_is_near_float32():
    params, _, _ = _expected()
    exact = _hidden(CONFIG, params, **WHOLE)
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    hidden = _hidden(config, params, **WHOLE)
    assert hidden.dtype == jnp.bfloat16
    error = jnp.linalg.norm(hidden.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert 1e-4 < error < 0.02


def test_embeddings_may_come_in_as_they_are():
    plain = dataclasses.replace(CONFIG, scale_embedding=False)
    params = make_params(CONFIG)
    larger = params | {"embedding": params["embedding"] * CONFIG.width**0.5}
    out = Transformer(plain).apply({"params": larger}, BATCH["inputs"])
    expected = Transformer(CONFIG).apply({"params": params}, BATCH["inputs"])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_tied_and_untied_output_embeddings():
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    params = make_params(CONFIG)
    assert output_embedding(params, CONFIG) is params["unembedding"]
    tied_params = make_params(tied)
    assert "unembedding" not in tied_params
    assert output_embedding(tied_params, tied) is tied_params["embedding"]


def test_logits_are_float32_products():
    hidden = jnp.asarray([[1.0, 2.0]], jnp.bfloat16)
    table = jnp.asarray([[1.0, 0.0], [3.0, -1.0], [1 / 3, 0.0]])
    out = logits(hidden, table)
    assert out.dtype == jnp.float32
    # A third is rounded on the way in, the result is not.
    third = float(jnp.asarray(1 / 3, jnp.bfloat16))
    np.testing.assert_array_equal(out, [[1.0, 1.0, third]])


@pytest.mark.parametrize("implementation", ["xla", None])
def test_no_token_sees_a_later_one(implementation):
    config = make_config(attention={"implementation": implementation})
    params, inputs = _expected()[0], BATCH["inputs"]
    before = _hidden(config, params, **WHOLE)
    later = inputs.at[:, 6].add(1) % VOCAB
    after = _hidden(config, params, later, WHOLE["segment_ids"])
    np.testing.assert_array_equal(after[:, :6], before[:, :6])
    assert np.all(np.any(after[:, 6:] != before[:, 6:], axis=-1))
    expected = _hidden(CONFIG, params, **WHOLE)
    np.testing.assert_allclose(before, expected, rtol=1e-4, atol=1e-4)


def test_documents_do_not_see_their_neighbours():
    params, _, _ = _expected()
    ids = jnp.asarray([[1, 1, 2, 2, 2, 2, 2, 3, 3, 0, 0], [9] * 5 + [1] * 6])
    document = jnp.asarray([3, 1, 4, 1, 5])
    inputs = BATCH["inputs"].at[0, 2:7].set(document).at[1, :5].set(document)
    one = _hidden(CONFIG, params, inputs, ids)
    # At another place among other documents, and at the start of a row.
    np.testing.assert_allclose(one[0, 2:7], one[1, :5], rtol=1e-4, atol=1e-5)
    others = inputs.at[0, jnp.asarray([0, 1, 7, 8, 9, 10])].add(5) % VOCAB
    other = _hidden(CONFIG, params, others, ids)
    np.testing.assert_array_equal(one[0, 2:7], other[0, 2:7])
    assert not np.allclose(one[0, 7:9], other[0, 7:9])


def test_positions_default_to_places_in_documents():
    params, _, _ = _expected()
    inputs, ids = BATCH["inputs"], BATCH["segment_ids"]
    default = _hidden(CONFIG, params, inputs, ids)
    positions = np.zeros(ids.shape, np.int32)
    for i in range(1, ids.shape[1]):
        positions[:, i] = np.where(ids[:, i] == ids[:, i - 1], positions[:, i - 1] + 1, 0)
    given = _hidden(CONFIG, params, inputs, ids, jnp.asarray(positions))
    np.testing.assert_allclose(given, default, rtol=1e-5, atol=1e-6)
    # RoPE sees differences alone, so it takes a stretch to show that they are used.
    stretched = _hidden(CONFIG, params, inputs, ids, jnp.asarray(3 * positions))
    assert np.abs(stretched - default).max() > 1e-3


def test_an_id_outside_the_vocabulary_gives_nan_not_another_word():
    params, _, _ = _expected()
    hidden = _hidden(CONFIG, params, BATCH["inputs"].at[0, 5].set(VOCAB), WHOLE["segment_ids"])
    assert np.all(np.isnan(hidden[0, 5])) and np.all(np.isfinite(hidden[1]))


INPUTS = jnp.zeros((2, 4), jnp.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": INPUTS[0]}, r"inputs' shape is \(4,\), but it must be \[batch, length\]"),
        ({"inputs": INPUTS * 1.0}, "inputs' dtype is 'float32', but it must be an integer"),
        ({"segment_ids": INPUTS[:, :3]}, r"segment_ids' shape is \(2, 3\), .* \(2, 4\)"),
        ({"positions": INPUTS[:1]}, r"positions' shape is \(1, 4\), .* \(2, 4\)"),
        ({"attend": lambda *_: None}, "attend is given, but scan_layers must be False"),
    ],
)
def test_bad_inputs(arguments, message):
    arguments = {"inputs": INPUTS, **arguments}
    with pytest.raises(InputError, match=message):
        Transformer(CONFIG).apply({"params": make_params(CONFIG)}, **arguments)
