"""Run by test_collectives.py in a process of its own, with eight simulated devices.

    python -m tests.sharding.collectives_program MESH...

Compiles the train step for each mesh and prints one JSON object: the collectives of each,
as [kind, shapes, dtypes], and what `kept_parts` returns.
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from lazyattn import sharding
from lazyattn.checkpoint.state import StateFactory
from lazyattn.model import fetch
from lazyattn.model.objective import make_loss_fn
from lazyattn.model.parameters import init_params, partition_specs
from lazyattn.model.sharded_attention import sharded_attention
from lazyattn.training.optimizer import make_optimizer, make_schedule
from lazyattn.training.step import make_train_step
from tests.sharding import cases, hlo


def compiled(mesh):
    """Returns the text of the compiled step."""
    config = cases.model()
    optimizer = make_optimizer(cases.OPTIMIZER, 2)
    factory = StateFactory(
        lambda key: init_params(config, key), partition_specs(config), optimizer, mesh, 0
    )
    step = make_train_step(
        make_loss_fn(config),
        optimizer,
        make_schedule(cases.OPTIMIZER, 2),
        mesh=mesh,
        shardings=factory.shardings,
    )
    batch = sharding.shard_batch(cases.batch(0), mesh)
    return step.lower(factory.abstract, batch).compile().as_text()


def careless():
    """Returns the text of a program that brings all rows to every device."""
    config = cases.model()
    mesh = sharding.make_mesh(cases.MESHES["data"])
    shape = (cases.ROWS, cases.LENGTH, config.width)
    rows = jax.sharding.NamedSharding(mesh, sharding.spec("batch", "length", None))
    everywhere = jax.sharding.NamedSharding(mesh, sharding.spec())
    x = jax.ShapeDtypeStruct(shape, "float32", sharding=rows)
    return jax.jit(lambda x: 2 * x, out_shardings=everywhere).lower(x).compile().as_text()


def kept_parts(bound):
    """Returns what a device keeps of attention between the passes, over its part of the queries.

    Args:
      bound: of scores, by which it chooses how far to fetch; None: it gathers.
    """
    mesh = sharding.make_mesh(cases.MESHES["sequence"])
    x = jax.ShapeDtypeStruct((1, 2048, 2, 16), "float32")
    table, offset = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((2, 64), (2,)))

    def attention(query, key, value, table, slope, offset):
        arrays = {"distance_bias": table, "distance_slope": slope, "offset": offset}
        return sharded_attention(
            *(query, key, value, arrays),
            sequence_shards=8,
            return_weights=False,
            implementation="xla_chunked",
            skip_mass=1e-6,
            bound=bound,
        )

    with jax.set_mesh(mesh):
        args = (x, x, x, table, offset, offset)
        kept = jax.eval_shape(lambda *args: jax.vjp(attention, *args)[1], *args)
    return sum(leaf.size for leaf in jax.tree.leaves(kept)) / x.size


def main() -> None:
    report = {"careless": hlo.collectives(careless())}
    for name in sys.argv[1:]:
        mesh = sharding.make_mesh(cases.MESHES[name], jax.devices()[: 4 if name == "tensor" else 8])
        report[name] = hlo.collectives(compiled(mesh))
    plain = {name: list(map(dataclasses.astuple, found)) for name, found in report.items()}
    bound = fetch.Bound(jax.numpy.float32(1), np.ones(2, np.float32))
    kept = {"gathered": kept_parts(None), "fetched": kept_parts(bound)}
    json.dump({"collectives": plain, "kept": kept}, sys.stdout)


if __name__ == "__main__":
    main()
