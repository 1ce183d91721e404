"""A model of a few dozen parameters with the trainer's interface, for quick tests."""

import jax
import jax.numpy as jnp
import numpy as np

from lazyattn.checkpoint.state import StateFactory
from lazyattn.experiment.training import OptimizerConfig
from lazyattn.model.loss import LossSums
from lazyattn.model.objective import counted
from lazyattn.sharding import spec
from lazyattn.training.optimizer import make_optimizer, make_schedule
from lazyattn.training.step import make_train_step

VOCAB, WIDTH = 7, 4
OPTIMIZER = OptimizerConfig(learning_rate=0.05, warmup_steps=2, eps=1e-8)


def init_params(key):
    return {
        "embedding": jax.random.normal(key, (VOCAB, WIDTH)),
        "unembedding": jnp.zeros((WIDTH, VOCAB)),
        "final_norm": jnp.ones(WIDTH),
    }


SPECS = {
    "embedding": spec("vocab", "embed"),
    "unembedding": spec("embed", "vocab"),
    "final_norm": spec("norm"),
}


def loss_fn(params, batch, z_loss=0.0):
    """A bigram model; a target equal to VOCAB makes the loss NaN."""
    hidden = params["embedding"][batch["inputs"]] * params["final_norm"]
    logits = hidden @ params["unembedding"]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1, mode="fill")[..., 0]
    weights = counted(batch)
    nll = jnp.sum((log_z - target) * weights)
    squared = jnp.sum(jnp.square(log_z) * weights)
    return LossSums(nll + z_loss * squared, nll, squared, jnp.sum(weights, dtype=jnp.float32))


def batch(seed, rows=4, length=6):
    """Returns a batch with a different amount of padding in every row."""
    random = np.random.default_rng(seed)
    inputs = random.integers(VOCAB, size=(rows, length))
    lengths = random.integers(1, length + 1, size=(rows, 1))
    positions = np.broadcast_to(np.arange(length), inputs.shape)
    segment_ids = (positions < lengths).astype(np.int32)
    data = {
        "inputs": inputs,
        "targets": (2 * inputs + 1) % VOCAB,
        "segment_ids": segment_ids,
        "positions": positions,
    }
    return {name: array.astype(np.int32) for name, array in data.items()}


def poisoned(batch):
    return batch | {"targets": np.full_like(batch["targets"], VOCAB)}


class Batches:
    """An endless iterator whose state is a number."""

    def __init__(self, poison=()):
        self.index = 0
        self.poison = frozenset(poison)

    def __iter__(self):
        return self

    def __next__(self):
        data = batch(self.index)
        if self.index in self.poison:
            data = poisoned(data)
        self.index += 1
        return data

    def position(self):
        return self.index

    def state_at(self, position):
        return {"index": position}

    def set_state(self, state):
        self.index = state["index"]


def make(mesh, steps=20, optimizer=OPTIMIZER, loss_fn=loss_fn, **settings):
    """Returns (state factory, step function)."""
    transformation = make_optimizer(optimizer, steps)
    factory = StateFactory(init_params, SPECS, transformation, mesh, seed=0)
    step = make_train_step(
        loss_fn,
        transformation,
        make_schedule(optimizer, steps),
        mesh=mesh,
        shardings=factory.shardings,
        **settings,
    )
    return factory, step
