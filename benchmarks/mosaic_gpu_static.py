"""Compiles the Hopper kernels to machine code for an H100, without a GPU: registers, spills.

    pip install --no-deps --target build/cuda jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
    PYTHONPATH=build/cuda python -m benchmarks.mosaic_gpu_static --head_dim=64

ptxas itself prints what each kernel needs: no line may tell of spills in a loop, nor of
products that are serialised. With --sass the machine code follows, if nvdisasm is found in
the folder --cuda_root/bin (Triton's package has one); `benchmarks.machine_code` checks it.
"""

import os

# Read when JAX and its plugin start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies

from lazyattn import lazy_attention, paths
from pallas_kernels import gpu
from pallas_kernels.mosaic_gpu import backend

assert backend  # What it imports sets MOSAIC_GPU_CUDA_ROOT, which --cuda_root replaces.

_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Head size.")
_LENGTH = flags.DEFINE_integer("length", 4096, "Sequence length.")
_WIDTH = flags.DEFINE_integer("width", 1024, "Bias table.")
_GROUP = flags.DEFINE_integer("group", 1, "Query heads a key head.")
_PACKED = flags.DEFINE_boolean("packed", False, "Several documents a row.")
_WINDOW = flags.DEFINE_integer("window", None, "Keys that a query sees.")
_OFFSET = flags.DEFINE_boolean("offset", True, "Elastic-Softmax.")
_SLOPE = flags.DEFINE_boolean("slope", True, "The bias goes on past its table.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16"], "Inputs.")
_SASS = flags.DEFINE_boolean("sass", False, "Also print the machine code.")
_CUDA_ROOT = paths.define("cuda_root", None, "Folder whose bin has nvdisasm.")

# What XLA wants to know of an H100 SXM.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main(argv: list[str]) -> None:
    """Compiles forward and backward pass."""
    del argv
    if _SASS.value:
        os.environ["MOSAIC_GPU_DUMP_SASS"] = "1"
    if _CUDA_ROOT.value:
        os.environ["MOSAIC_GPU_CUDA_ROOT"] = _CUDA_ROOT.value
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=_H100
    )
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    heads, length = 2 * _GROUP.value, _LENGTH.value

    def shape(*dims: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    args = {
        name: shape(1, length, n, _HEAD_DIM.value, dtype=_DTYPE.value)
        for name, n in (("query", heads), ("key", 2), ("value", 2))
    }
    args["distance_bias"] = shape(heads, _WIDTH.value)
    if _SLOPE.value:
        args["distance_slope"] = shape(heads)
    if _OFFSET.value:
        args["offset"] = shape(heads)

    def loss(args: dict[str, jax.Array]) -> jax.Array:
        ids = jnp.zeros((1, length), jnp.int32) if _PACKED.value else None
        settings = {"window": _WINDOW.value, "implementation": "mosaic_gpu"}
        out = lazy_attention(**args, segment_ids=ids, **settings)
        return jnp.sum(out.astype(jnp.float32))

    with gpu.pretend_capability(90):
        lowered = jax.jit(jax.value_and_grad(loss)).lower(args)
    print(lowered.compile().memory_analysis())


if __name__ == "__main__":
    app.run(main)
