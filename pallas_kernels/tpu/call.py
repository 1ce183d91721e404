"""One way to launch a kernel, by names rather than positions."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.tpu import config
from pallas_kernels.tpu.kernel_types import Index, Refs, Scratch
from pallas_kernels.tpu.support import generation


@dataclasses.dataclass(frozen=True)
class Operand:
    """An input or output: its name in the kernel, and which block of it a step sees.

    Attributes:
      name: of the reference in the kernel.
      array: the input, or the output's shape and dtype.
      block: shape of a block; None: all of it, left in HBM.
      index: block indices as a function of grid indices and scalar references.
      scalars: whether blocks go to scalar memory.
    """

    name: str
    array: Array | jax.ShapeDtypeStruct
    block: tuple[int, ...] | None
    index: Callable[..., tuple[Index, ...]] | None = None
    scalars: bool = False

    @property
    def spec(self) -> pl.BlockSpec:
        """Returns what Pallas calls this."""
        if self.block is None:
            return pl.BlockSpec(memory_space=pl.ANY)
        if self.scalars:
            return pl.BlockSpec(self.block, self.index, memory_space=pltpu.SMEM)
        return pl.BlockSpec(self.block, self.index)


def launch(
    kernel: Callable[[Refs], None],
    name: str,
    grid: tuple[int, ...],
    parallel: int,
    scalars: dict[str, Array],
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
    scratch: Scratch,
    aliases: dict[str, str] | None = None,
    interpret: Any = None,
) -> dict[str, Array]:
    """Runs a kernel over a grid and returns its outputs by name.

    Args:
      kernel: takes a namespace of all references.
      name: of the kernel, for profiles and dumps.
      grid: steps along each axis.
      parallel: how many leading axes cores may share out among themselves.
      scalars: arrays that are in scalar memory before the first step.
      inputs: see `Operand`.
      outputs: see `Operand`.
      scratch: memory that stays from step to step.
      aliases: inputs that an output overwrites.
      interpret: parameters of interpret mode; None: compile.
    """
    names = [*scalars, *(x.name for x in inputs), *(x.name for x in outputs), *scratch]
    arrays = [*scalars.values(), *(x.array for x in inputs)]
    varying: frozenset[Hashable] = frozenset()
    for array in arrays:
        varying |= jax.typeof(array).manual_axis_type.varying
    over = jax.sharding.ManualAxisType(varying=varying)
    positions = {x.name: n for n, x in enumerate(inputs, len(scalars))}
    places = {x.name: n for n, x in enumerate(outputs)}
    semantics: list[Any] = ["parallel"] * parallel + ["arbitrary"] * (len(grid) - parallel)
    tpu = generation()
    assert tpu is not None
    results = pl.pallas_call(
        lambda *refs: kernel(Refs(**dict(zip(names, refs, strict=True)))),
        out_shape=[
            jax.ShapeDtypeStruct(x.array.shape, x.array.dtype, manual_axis_type=over)
            for x in outputs
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[x.spec for x in inputs],
            out_specs=[x.spec for x in outputs],
            scratch_shapes=list(scratch.values()),
        ),
        input_output_aliases={positions[a]: places[b] for a, b in (aliases or {}).items()},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics,
            vmem_limit_bytes=config.vmem_limit(tpu),
        ),
        interpret=False if interpret is None else interpret,
        name=name,
    )(*arrays)
    return dict(zip((x.name for x in outputs), results, strict=True))
