"""libtpu's compiler on a machine without a TPU: executables, and the schedules it writes."""

import dataclasses
import importlib.metadata
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lazyattn.compile import libtpu

# What `jax.experimental.topologies` calls the smallest slice of each generation.
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "7x": "tpu7x:2x2x1",
}
# Bundles of a loop's end among which those of what follows may stand.
_MIXED = 64


class Compiler:
    """Compiles for TPUs. At most one a process, made before JAX looks for TPUs.

    Attributes:
      dumps: folder of schedules; empty before every compilation.
    """

    def __init__(self, *, dump: bool = True):
        libtpu.prepare()
        self._folder = tempfile.TemporaryDirectory()
        self.dumps = pathlib.Path(self._folder.name)
        if dump:
            os.environ["LIBTPU_INIT_ARGS"] = (
                f"--xla_jf_dump_to={self.dumps} --xla_jf_dump_llo_text=true"
            )

    def devices(self, topology: str) -> Sequence[Any]:
        """Returns the devices of a topology, e.g. "v5p:2x2x1"."""
        from jax.experimental import topologies

        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices

    def compile(
        self, function: Callable[..., Any], arguments: Any, generation: str
    ) -> tuple[Any, float]:
        """Compiles for one TPU.

        Args:
          function: of the arguments, not jitted.
          arguments: a tuple of trees of `jax.ShapeDtypeStruct`.
          generation: a key of `TOPOLOGIES`.

        Returns:
          the compiled executable, and the seconds it took.
        """
        from pallas_kernels import target

        for file in self.dumps.iterdir():
            file.unlink()
        mesh = jax.sharding.Mesh(np.array(self.devices(TOPOLOGIES[generation])[:1]), ("one",))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), arguments
        )
        start = time.perf_counter()
        # Pallas asks the mesh what it lowers for.
        with (
            target.compile_for(generation),
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        ):
            lowered = jax.jit(function).lower(*placed)
        return lowered.compile(), time.perf_counter() - start

    def schedule(self, kernel: str) -> "Schedule":
        """Returns the final schedule of the kernel whose name starts like this."""
        files = [
            file
            for file in self.dumps.glob(f"*-{kernel}*-final_bundles.txt")
            if "schedule-analysis" not in file.name
        ]
        assert files, f"no schedule of {kernel}"
        return Schedule.parse(max(files, key=lambda file: file.name).read_text())


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive bundles of a schedule: instructions that issue in one cycle each.

    Attributes:
      start, stop: of the bundles.
      bundles: how many.
      products: instructions for the matrix units.
      issuing: bundles with such an instruction.
      spills: vector registers stored or loaded for want of registers.
    """

    start: int
    stop: int
    products: int
    issuing: int
    spills: int

    @property
    def bundles(self) -> int:
        """Returns how many bundles these are."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A kernel's final instruction schedule.

    Attributes:
      text: of each bundle.
      depth: loops around each bundle.
      regions: parts that a branch may skip, and parts of them.
      loops: parts that are loop bodies, with their depth.
    """

    text: tuple[str, ...]
    depth: tuple[int, ...]
    regions: tuple[Part, ...]
    loops: tuple[tuple[int, Part], ...]

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Reads what the compiler wrote."""
        rows, depth, heads = [], [], []
        starts: dict[str, int] = {}
        spans = []
        for line in text.splitlines():
            match = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*(>*)", line)
            if match is None:
                continue
            if match.group(1) == "LB":
                heads.append(len(rows))
            for empty, region in re.findall(r"Start(/End empty)? region (\d+)", line):
                if not empty:
                    starts[region] = len(rows)
            rows.append(line)
            # An empty bundle is written without its loops.
            empty_bundle = depth and re.search(r":\s*\{\s*\}", line)
            depth.append(depth[-1] if empty_bundle else len(match.group(2)))
            for region in re.findall(r"(?<!/)End region (\d+)", line):
                if region in starts:
                    spans.append((starts[region], len(rows)))

        def part(start: int, stop: int) -> Part:
            some = rows[start:stop]
            return Part(
                start,
                stop,
                sum(row.count("vmatmul") for row in some),
                sum("vmatmul" in row for row in some),
                sum(len(re.findall(r"(?:vst|vld)[^;]*_spill", row)) for row in some),
            )

        loops = []
        for start in heads:
            stop, own, at = start + 1, depth[start], start + 1
            # The first bundles after a loop may stand among its last ones.
            while at < len(rows) and at - stop < _MIXED:
                if at in heads and depth[at] == own:
                    break
                if depth[at] >= own:
                    stop = at + 1
                at += 1
            loops.append((depth[start], part(start, stop)))
        return cls(tuple(rows), tuple(depth), tuple(part(*span) for span in spans), tuple(loops))

    def inner_loops(self) -> list[Part]:
        """Returns the innermost loops with matrix products, in order."""
        deepest = max((depth for depth, loop in self.loops if loop.products), default=0)
        return [loop for depth, loop in self.loops if depth == deepest and loop.products]


def requirement() -> str:
    """Returns the libtpu that the installed jax asks for, as pip writes it."""
    wanted = importlib.metadata.requires("jax") or []
    return next(line for line in wanted if line.startswith("libtpu")).split(";")[0].strip()


if __name__ == "__main__":
    print(requirement())
