"""Run by test_mesh.py in a process of its own, with eight simulated devices.

Prints the largest differences between the logits of a mesh and of one device, as JSON.
"""

import json
import sys

import jax
import numpy as np

from lazyattn import sharding
from lazyattn.generation import decode_step, extend, free, init_cache, plan_cache, prefill, prepare
from lazyattn.model.parameters import partition_specs
from tests.model.tiny import make_config, make_params

CONFIG = make_config(vocab_size=32, attention={"qk_norm": True, "num_kv_heads": 4, "head_dim": 8})
TOKENS = np.random.default_rng(0).integers(32, size=(2, 150))


def run(params):
    """Returns the logits of all that can be done with a cache."""
    plan = plan_cache(params, CONFIG, 150, buckets=(48, 64, 96))
    assert any(group.slots < 150 for layer in plan.layers for group in layer)
    model, cache = prepare(params, CONFIG), init_cache(plan, 2)
    found = [None] * 5
    found[0], cache = prefill(model, cache, TOKENS[:, :100], [100, 40])
    found[1], cache = extend(model, cache, TOKENS[:, 100:120], [20, 3])
    found[2], cache = decode_step(model, cache, TOKENS[:, 120])
    found[3], cache = decode_step(model, cache, TOKENS[:, 121:123])
    found[4], cache = prefill(model, free(cache, 1), TOKENS[:1, :10], [10], [1])
    return [np.asarray(x) for x in found]


def main() -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.device_count() == 8
    params = make_params(CONFIG)
    expected = run(params)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    specs = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), partition_specs(CONFIG))
    with jax.set_mesh(mesh):
        found = run(jax.device_put(params, specs))
    pairs = zip(found, expected, strict=True)
    json.dump([float(np.abs(a - b).max()) for a, b in pairs], sys.stdout)


if __name__ == "__main__":
    main()
