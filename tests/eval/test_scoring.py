"""Scores against the plain forward pass, whatever they are batched with."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.errors import InputError
from lazyattn.eval.scoring import Scorer, full_precision, progress, row_lengths
from lazyattn.model.transformer import Transformer, logits, output_embedding
from lazyattn.sharding import MeshConfig, make_mesh
from tests.model.tiny import VOCAB, make_config, make_params

CONFIG = make_config(attention={"implementation": "xla_chunked"})
MESH = make_mesh(MeshConfig(), jax.devices()[:1])
LENGTHS = (70, 2, 33, 17, 90, 5, 64, 65, 66)


@functools.cache
def _params(config=CONFIG):
    return make_params(config)


def _sequences(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(VOCAB, size=length) for length in lengths]


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, inputs):
    hidden = Transformer(config).apply({"params": params}, inputs)
    return logits(hidden, output_embedding(params, config))


def _plain(config, sequence, divisor_length=None):
    """Returns nll and greediness by the definition, one sequence at a time, float32."""
    plain = make_config(config.attention.variant, attention={"implementation": "xla"})
    inputs = np.asarray(sequence[:-1])
    if divisor_length:  # the row's length is part of what lazy_length_offset is
        inputs = np.pad(inputs, (0, divisor_length - inputs.size))
    with jax.default_matmul_precision("highest"):
        scores = np.asarray(_logits(plain, _params(config), jnp.asarray(inputs)[None])[0])
    scores = scores[: len(sequence) - 1]
    log_z = np.log(np.exp(scores.astype(np.float64)).sum(-1))
    nll = log_z - scores[np.arange(len(scores)), sequence[1:]]
    return nll, scores.argmax(-1) == sequence[1:]


@pytest.fixture(scope="module")
def scorer():
    return Scorer(_params(), CONFIG, MESH, batch_tokens=256)


def test_scores_are_those_of_a_plain_forward_pass(scorer):
    # Each of the three without any padding, which costs a compilation.
    sequences = _sequences()
    for index, found in list(enumerate(scorer(sequences, context=96)))[:3]:
        nll, greedy = _plain(CONFIG, sequences[index])
        np.testing.assert_allclose(found.nll, nll, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found.greedy, greedy)
        assert found.nll.dtype == np.float32


def test_scores_depend_on_neither_the_batch_nor_the_padding(scorer):
    sequences = _sequences()
    together = scorer(sequences, context=96)
    alone = [scorer([sequence], context=96)[0] for sequence in sequences]
    other = _sequences(lengths=[95] * 5, seed=1)
    mixed = scorer([*other, *reversed(sequences)], context=96)[: len(other) - 1 : -1]
    for first, *others in zip(together, alone, mixed, strict=True):
        for second in others:
            np.testing.assert_allclose(second.nll, first.nll, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(second.greedy, first.greedy)


def test_a_whole_evaluation_compiles_a_shape_for_each_row_length(scorer):
    rng = np.random.default_rng(2)
    before = scorer.compilations
    for seed in range(4):
        scorer(_sequences(rng.integers(2, 98, size=20), seed), context=96)
    assert row_lengths(CONFIG, 96) == (64, 96)
    assert scorer.compilations <= 2 and before <= 2


def test_row_lengths_are_powers_of_two_up_to_the_context():
    assert row_lengths(CONFIG, 8192) == (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    assert row_lengths(CONFIG, 100) == (64, 100)
    assert row_lengths(CONFIG, 64) == (64,)
    assert row_lengths(CONFIG, 7) == (7,)


def test_the_length_offset_is_divided_by_the_context_and_never_by_padding():
    config = make_config("lazy_length_offset", attention={"implementation": "xla_chunked"})
    assert row_lengths(config, 128) == (128,)
    (sequence,) = _sequences([20])
    (found,) = Scorer(_params(config), config, MESH, batch_tokens=1)([sequence], context=128)
    nll, _ = _plain(config, sequence, divisor_length=128)
    np.testing.assert_allclose(found.nll, nll, rtol=1e-5, atol=1e-5)


def test_exact_scores_are_full_precision_and_skip_nothing():
    config = make_config(compute_dtype="bfloat16", attention={"skip_mass": 1e-2})
    exact = full_precision(config)
    assert exact.compute_dtype == "float32" and exact.attention.skip_mass == 0
    assert Scorer({}, config, MESH, exact=False).config == config


def test_batches_have_rows_for_every_device():
    devices = jax.sharding.Mesh(np.array(jax.devices() * 6).reshape(2, 3, 1, 1), MESH.axis_names)
    scorer = Scorer({}, CONFIG, devices, batch_tokens=1000)
    assert scorer.rows(64) == 12 and scorer.rows(512) == 6


@pytest.mark.parametrize(
    ("sequences", "context", "message"),
    [
        ([[1]], 8, "the tokens of a sequence to score is 1, but it must be from 2 to 9"),
        ([[1, 2], list(range(10))], 8, "the tokens of a sequence to score is 10, but it must be"),
        ([[1, VOCAB]], 8, f"a token to score is {VOCAB}, but it must be from 0 to {VOCAB - 1}"),
        ([[1, 2]], 0, "context is 0, but it must be at least 1"),
    ],
)
def test_bad_sequences(scorer, sequences, context, message):
    before = scorer.compilations
    with pytest.raises(InputError, match=message):
        scorer(sequences, context=context)
    assert scorer.compilations == before


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_and_nowhere_else():
    for stream, label, shown in (
        (_Terminal(), "text", True),
        (io.StringIO(), "text", False),
        (_Terminal(), "", False),
    ):
        with progress(label, 10, stream) as bar:
            bar.update(5)
            bar.refresh()
        assert ("text:  50%|" in stream.getvalue()) is shown
    assert "\n" not in stream.getvalue()
