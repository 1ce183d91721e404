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

from benchmarks import hopper_target
from lazyattn import lazy_attention, paths
from pallas_kernels import target
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


def main(argv: list[str]) -> None:
    """Compiles forward and backward pass."""
    del argv
    if _SASS.value:
        os.environ["MOSAIC_GPU_DUMP_SASS"] = "1"
    if _CUDA_ROOT.value:
        os.environ["MOSAIC_GPU_CUDA_ROOT"] = _CUDA_ROOT.value
    mesh = jax.sharding.Mesh(np.array([hopper_target.device()]), ("device",))
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

    with target.compile_for("sm90"):
        lowered = jax.jit(jax.value_and_grad(loss)).lower(args)
    print(lowered.compile().memory_analysis())


if __name__ == "__main__":
    app.run(main)
