"""Run by test_sameness.py in a process of its own, with eight simulated devices.

    python -m tests.sharding.sameness_program VARIANT[+muon|+qk_norm|+fp8] STEPS MESH...

Prints one JSON object: for each mesh the largest relative difference from one device of
the loss and the gradients of the first step, and of the losses of STEPS steps.
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from lazyattn import sharding
from lazyattn.checkpoint.state import StateFactory
from lazyattn.model.objective import make_loss_fn
from lazyattn.model.parameters import init_params, partition_specs
from lazyattn.training.optimizer import make_optimizer, make_schedule
from lazyattn.training.step import accumulate_gradients, make_train_step
from tests.sharding import cases

Z_LOSS = 1e-3


def run(config, mesh, steps, settings=cases.OPTIMIZER, quantization="none"):
    """Returns (loss, gradients, losses of the steps) as numpy arrays."""
    loss_fn = make_loss_fn(config, Z_LOSS, quantization=quantization)
    optimizer = make_optimizer(settings, steps)
    factory = StateFactory(
        lambda key: init_params(config, key), partition_specs(config), optimizer, mesh, 0
    )
    state = factory.create()
    batches = [sharding.shard_batch(cases.batch(seed), mesh) for seed in range(max(1, steps))]
    with jax.set_mesh(mesh):
        gradient = jax.jit(
            lambda params, batch: accumulate_gradients(loss_fn, params, batch, microbatches=1),
            out_shardings=(None, factory.shardings.params),
        )
        means, gradients = jax.device_get(gradient(state.params, batches[0]))
    losses = []
    if steps:
        step = make_train_step(
            loss_fn,
            optimizer,
            make_schedule(settings, steps),
            mesh=mesh,
            shardings=factory.shardings,
        )
        for batch in batches:
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return means.objective, gradients, np.array(losses)


def difference(found, expected):
    """Returns the largest difference of two trees, each array's relative to its largest entry."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(
        float(np.abs(a - b).max() / (np.abs(b).max() + 1e-9)) if a.size else 0.0 for a, b in pairs
    )


def main() -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.device_count() == 8
    variant, steps, *names = sys.argv[1:]
    variant, _, more = variant.partition("+")
    config = cases.model(variant)
    if more == "qk_norm":
        attention = dataclasses.replace(config.attention, qk_norm=True)
        config = dataclasses.replace(config, attention=attention)
    name = "muon" if more == "muon" else "adamw"
    settings = dataclasses.replace(cases.OPTIMIZER, name=name)
    quantization = "fp8" if more == "fp8" else "none"
    one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    expected = run(config, one, int(steps), settings, quantization)
    report = {}
    for name in names:
        mesh_config = cases.MESHES[name]
        devices = 4 if name == "tensor" else 8
        mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
        found = run(config, mesh, int(steps), settings, quantization)
        report[name] = {
            "loss": difference(found[0], expected[0]),
            "gradients": difference(found[1], expected[1]),
            "run": difference(found[2], expected[2]),
        }
        print(name, report[name], file=sys.stderr, flush=True)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
