import jax
import numpy as np
import pytest

from lazyattn.eval.perplexity import Evaluator
from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.parameters import init_params, partition_specs
from lazyattn.sharding import MeshConfig, make_mesh
from tests.training import toy

MESH = make_mesh(MeshConfig(), jax.devices()[:1])
BYTES = np.arange(toy.VOCAB, dtype=np.int32)


def _shardings(specs):
    return jax.tree.map(lambda spec: jax.sharding.NamedSharding(MESH, spec), specs)


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(ModelConfig(), MESH, _shardings(toy.SPECS), BYTES, loss_fn=toy.loss_fn)


def _by_hand(params, batches):
    """Returns (nll in nats, tokens, bytes), one token at a time."""
    nll, tokens, size = 0.0, 0, 0
    for batch in batches:
        for row, column in np.argwhere(batch["segment_ids"] > 0):
            hidden = params["embedding"][batch["inputs"][row, column]] * params["final_norm"]
            logits = np.asarray(hidden @ params["unembedding"], np.float64)
            target = batch["targets"][row, column]
            nll += np.log(np.exp(logits).sum()) - logits[target]
            tokens, size = tokens + 1, size + BYTES[target]
    return nll, tokens, size


def test_figures_over_uneven_batches(evaluator):
    params = toy.init_params(jax.random.PRNGKey(0))
    params["unembedding"] = jax.random.normal(jax.random.PRNGKey(1), params["unembedding"].shape)
    batches = [toy.batch(seed) for seed in range(3)]
    batches[2]["segment_ids"][2:] = 0  # rows of padding, as in a last batch
    nll, tokens, size = _by_hand(params, batches)
    found = evaluator(params, iter(batches))
    assert (found.tokens, found.bytes) == (tokens, size)
    assert found.loss == pytest.approx(nll / tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(nll / tokens), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nll / np.log(2) / size, rel=1e-5)


def test_what_lies_in_padding_does_not_matter(evaluator):
    params = toy.init_params(jax.random.PRNGKey(0))
    batch = toy.batch(0)
    changed = {name: np.copy(array) for name, array in batch.items()}
    for name in ("inputs", "targets"):
        changed[name][batch["segment_ids"] == 0] = 1
    assert evaluator(params, [batch]) == evaluator(params, [changed])


def test_nothing_to_evaluate_on(evaluator):
    batch = toy.batch(0)
    batch["segment_ids"][:] = 0
    with pytest.raises(ValueError, match="no target token"):
        evaluator(toy.init_params(jax.random.PRNGKey(0)), [batch])


def test_the_model_itself_starts_near_the_uniform_distribution():
    config = ModelConfig(
        vocab_size=32,
        width=16,
        num_layers=1,
        compute_dtype="float32",
        attention=AttentionConfig(num_heads=2, bias_width=8),
    )
    evaluator = Evaluator(config, MESH, _shardings(partition_specs(config)), np.ones(32, np.int32))
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.PRNGKey(0))
    found = evaluator(params, [toy.batch(0)])
    assert found.loss == pytest.approx(np.log(32), abs=1.0)
    assert found.bits_per_byte == pytest.approx(found.loss / np.log(2))
