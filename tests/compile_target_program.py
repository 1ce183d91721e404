"""Run by test_compile_target.py: compiles forward and backward for a TPU, by libtpu.

    python -m tests.compile_target_program v5p

Prints the names of the kernels in the executable.
"""

import sys

from lazyattn.compile import libtpu

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def main() -> None:
    libtpu.prepare()
    # JAX looks for TPUs when it starts.
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    import lazyattn

    generation = sys.argv[1]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shape(*sizes, dtype="float32"):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    args = {
        "query": shape(1, 512, 2, 64, dtype="bfloat16"),
        "key": shape(1, 512, 1, 64, dtype="bfloat16"),
        "value": shape(1, 512, 1, 64, dtype="bfloat16"),
        "distance_bias": shape(2, 128),
        "distance_slope": shape(2),
        "offset": shape(2),
    }

    def loss(args):
        return jnp.sum(lazyattn.lazy_attention(**args).astype(jnp.float32))

    with lazyattn.compile_for(generation):
        text = jax.jit(jax.value_and_grad(loss)).lower(args).compile().as_text()
    print(*(name for name in ("lazy_forward", "lazy_backward") if name in text))


if __name__ == "__main__":
    main()
