"""What the Triton compiler makes of the kernels, without a GPU.

Registers, spilled bytes and shared memory of every kernel that one call launches, for any
compute capability, and whether the assembler had to let tensor cores wait for each
other's results:

    python -m benchmarks.triton_static --capability=90 --head_dim=64 --dtype=bfloat16

With --implementation=mosaic_gpu, of the small kernels that plan a call of the Hopper kernels.
Needs the triton package, whose ptxas it runs. Exits with status 1 if a kernel spills more than
--spills or asks for more shared memory than the GPU has.
"""

import contextlib
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jaxtyping import Array

from lazyattn import lazy_attention
from pallas_kernels import problem, target
from pallas_kernels.triton import config, plan

_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int8": "i8"}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch as it was asked for; `types` are those of its pointers."""

    kernel: Any
    types: tuple[str, ...]
    block: config.Block
    static: Any

    @property
    def name(self) -> str:
        """Returns the kernel's name; "inference" for a forward pass without residuals."""
        name = self.kernel.__name__.removeprefix("lazy_")
        inference = isinstance(self.static, plan.Static) and not self.static.training
        return "inference" if inference else name


@dataclasses.dataclass(frozen=True)
class Report:
    """What a kernel needs.

    Attributes:
      registers: a thread.
      spilled: bytes a thread stores for want of registers.
      shared: bytes of shared memory a program.
      programs: of them that fit on one multiprocessor; 0: not one does.
      serialized: products on compute capability 9.0 wait for each other, since the
        compiler moved their accumulators about.
    """

    registers: int
    spilled: int
    shared: int
    programs: int
    serialized: bool


def shared_memory(capability: int) -> int:
    """Returns the bytes of shared memory one program may have."""
    if capability in (86, 89) or capability >= 120:
        return 99 * 1024
    return (163 if capability < 90 else 227) * 1024


@contextlib.contextmanager
def captured(capability: int, blocks: config.Blocks | None) -> Iterator[list[Launch]]:
    """Gives a list that launches are added to, instead of being made, while calls are traced."""
    launches: list[Launch] = []

    def capture(kernel, arrays, outputs, grid, block, static, in_place=()):
        types = tuple(_TYPES[str(x.dtype)] for x in (*arrays, *outputs))
        launches.append(Launch(kernel, types, block, static))
        return [*(jnp.zeros(x.shape, x.dtype) for x in outputs), *(arrays[n] for n in in_place)]

    table = config.blocks
    if blocks is not None:
        config.blocks = lambda *_: blocks
    try:
        with target.compile_for(f"sm{capability}"), problem.options(launch_triton=capture):
            yield launches
    finally:
        config.blocks = table


def launches(
    capability: int,
    head_dim: int,
    dtype: str,
    *,
    length: int = 4096,
    width: int = 1024,
    slope: bool = True,
    offset: bool = True,
    packed: bool = False,
    group: int = 1,
    blocks: config.Blocks | None = None,
    implementation: str = "triton",
) -> dict[str, Launch]:
    """Returns the launches that inference and training make, by name.

    Args:
      capability: compute capability, e.g. 90.
      head_dim: head size.
      dtype: of the inputs.
      length: of the sequence.
      width: of the bias table; 0: no bias.
      slope: the bias has a tail.
      offset: Elastic-Softmax.
      packed: several documents a row.
      group: query heads a key head.
      blocks: to launch with; None: the table's.
      implementation: "triton", or "mosaic_gpu", which plans its calls with Triton.
    """
    heads = 2 * group

    def shape(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype)

    args = {
        "query": shape(1, length, heads, head_dim, dtype=dtype),
        "key": shape(1, length, 2, head_dim, dtype=dtype),
        "value": shape(1, length, 2, head_dim, dtype=dtype),
    }
    if width:
        args["distance_bias"] = shape(heads, width)
        if slope:
            args["distance_slope"] = shape(heads)
    if offset:
        args["offset"] = shape(heads)

    def run(args: dict[str, Array]) -> Array:
        ids = jnp.zeros((1, length), jnp.int32) if packed else None
        return lazy_attention(**args, segment_ids=ids, implementation=implementation)

    with captured(capability, blocks) as found:
        jax.eval_shape(run, args)
        jax.eval_shape(jax.grad(lambda args: jnp.sum(run(args).astype(jnp.float32))), args)
    return {launch.name: launch for launch in found}


def compiled(launch: Launch, capability: int) -> Any:
    """Returns Triton's compiled kernel, whose `asm` has every stage of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    *pointers, constant = launch.kernel.arg_names
    types = ["*" + name for name in launch.types]
    source = ASTSource(
        launch.kernel,
        dict(zip(pointers, types, strict=True)) | {constant: "constexpr"},
        {(len(pointers),): launch.static},
        {(n,): [["tt.divisibility", 16]] for n in range(len(pointers))},
    )
    options = {
        "num_warps": launch.block.warps,
        "num_stages": launch.block.stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def report(launch: Launch, capability: int) -> Report:
    """Compiles a launch to machine code and returns what it needs."""
    from triton.backends.nvidia.compiler import get_ptxas

    kernel = compiled(launch, capability)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        target = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target}", file.name]
        log = subprocess.run(
            [*command, "-o", "/dev/null"], check=True, capture_output=True, text=True
        ).stderr
    registers = int(_number(r"Used (\d+) registers", log))
    spilled = int(_number(r"(\d+) bytes spill stores", log))
    shared = int(kernel.metadata.shared)
    limit = shared_memory(capability)
    threads = 32 * launch.block.warps
    programs = 0
    if shared <= limit:
        by_shared = (limit + 1024) // (shared + 1024)
        programs = min(by_shared, 65536 // (-(-registers // 8) * 8 * threads), 2048 // threads)
    return Report(registers, spilled, shared, programs, "instructions are serialized" in log)


def _number(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, text
    return match.group(1)


def main(argv: list[str]) -> None:
    """Prints one line a kernel."""
    del argv
    options = flags.FLAGS
    bad = False
    print(f"sm_{options.capability}, head size {options.head_dim}, {options.dtype}")
    print("| kernel | queries x keys, warps, stages | registers | spilled | shared | programs | |")
    print("|---|---|---|---|---|---|---|")
    every = launches(
        options.capability,
        options.head_dim,
        options.dtype,
        length=options.length,
        width=options.width,
        slope=options.slope,
        offset=options.offset,
        packed=options.packed,
        group=options.group,
        implementation=options.implementation,
    )
    for name in options.only or every:
        found, block = report(every[name], options.capability), every[name].block
        print(
            f"| {name} | {block.queries} x {block.keys}, {block.warps}, {block.stages}"
            f" | {found.registers} | {found.spilled} | {found.shared} | {found.programs}"
            f" | {'serialized' if found.serialized else ''} |",
            flush=True,
        )
        bad |= found.spilled > options.spills or found.programs == 0
    sys.exit(int(bad))


if __name__ == "__main__":
    flags.DEFINE_integer("capability", 90, "Compute capability.")
    flags.DEFINE_integer("head_dim", 64, "Head size.")
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Inputs.")
    flags.DEFINE_integer("length", 4096, "Sequence length.")
    flags.DEFINE_integer("width", 1024, "Bias table; 0: no bias.")
    flags.DEFINE_boolean("slope", True, "The bias has a tail.")
    flags.DEFINE_boolean("offset", True, "Elastic-Softmax.")
    flags.DEFINE_boolean("packed", False, "Several documents a row.")
    flags.DEFINE_integer("group", 1, "Query heads a key head.")
    flags.DEFINE_enum("implementation", "triton", ["triton", "mosaic_gpu"], "Whose kernels.")
    flags.DEFINE_integer("spills", 0, "Bytes a thread may spill.")
    flags.DEFINE_list("only", [], "Kernels, e.g. forward,backward_dkv; none: all.")
    app.run(main)
