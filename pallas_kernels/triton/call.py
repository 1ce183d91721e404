"""One way to launch a Triton kernel from JAX, whatever the versions in use."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.gpu import compute_capability
from pallas_kernels.problem import Options, current_options
from pallas_kernels.triton.config import Block
from pallas_kernels.triton.support import refuses_in_place
from pallas_kernels.varying import vary_alike


def launch(
    kernel: Any,
    arrays: Sequence[Array | None],
    outputs: Sequence[jax.ShapeDtypeStruct | None],
    grid: tuple[int, ...],
    block: Block,
    static: Any,
    *,
    in_place: Sequence[int] = (),
) -> list[Any]:
    """Runs `kernel` once and returns its outputs.

    Args:
      kernel: a `triton.jit` function whose parameters are pointers to `arrays`, then to
        `outputs`, then the constant `static`.
      arrays: inputs; None: the kernel does not read that one.
      outputs: shapes and dtypes; their memory starts uninitialized. None: the kernel does not
        write that one, and None is returned for it.
      grid: programs along each axis, at most 65535 along the second.
      block: gives warps and stages; its sizes are in `static` already.
      static: what the kernel is compiled for.
      in_place: numbers of inputs that the kernel writes as well. What they are then is returned
        after the outputs, in the same memory if nothing else needs what they were.
    """
    # Every pointer must point somewhere.
    given = [jnp.zeros(1, jnp.float32) if x is None else x for x in arrays]
    wanted = [jax.ShapeDtypeStruct((1,), jnp.float32) if x is None else x for x in outputs]
    options = static if isinstance(static, Options) else current_options()
    run = options.launch_triton or _triton_call
    # Those who only look at launches know of no such inputs.
    more = {"in_place": in_place} if in_place else {}
    results = vary_alike(*run(kernel, given, wanted, grid, block, static, **more), like=given)
    kept = [*outputs, *(arrays[n] for n in in_place)]
    return [x if y is not None else None for x, y in zip(results, kept, strict=True)]


def _triton_call(
    kernel: Any,
    arrays: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    block: Block,
    static: Any,
    in_place: Sequence[int] = (),
) -> list[Array]:
    import jax_triton
    import triton
    from jaxlib import gpu_triton

    if not hasattr(gpu_triton, "TritonKernel"):  # Lowering would end in an AttributeError.
        raise NotImplementedError(
            f"{kernel.__name__} is compiled by a JAX for NVIDIA GPUs, even for one that is not"
            ' here, and this one is for CPUs only: install "jax[cuda13]".'
        )
    capability = compute_capability()
    assert capability is not None
    options: dict[str, Any] = {"enable_fp_fusion": True}
    if hasattr(jax_triton, "TensorDescriptor"):
        if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
            # Triton writes the newest PTX it can, which an older CUDA refuses.
            options["ptx_version"] = 87 if capability <= 100 else 90
        settings: dict[str, Any] = {"out_type": list(outputs), "backend_options": options}
    else:  # jax-triton 0.3
        settings = {"out_shape": list(outputs)} | options
    if in_place and (refused := refuses_in_place()):  # It would be silently wrong.
        raise NotImplementedError(f"{kernel.__name__} writes to its inputs, but {refused}.")
    refs = {n: jax.new_ref(arrays[n]) for n in in_place}
    results = jax_triton.triton_call(
        *(refs.get(n, x) for n, x in enumerate(arrays)),
        kernel=kernel,
        grid=grid,
        name=kernel.__name__,
        num_warps=block.warps,
        num_stages=block.stages,
        compute_capability=capability,
        static=static,
        **settings,
    )
    return [*results, *(jax.freeze(refs[n]) for n in in_place)]
