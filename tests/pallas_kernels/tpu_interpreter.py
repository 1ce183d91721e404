"""Runs the TPU kernels on a CPU, in Pallas's TPU interpret mode."""

import contextlib
import unittest.mock
from collections.abc import Iterator

from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # races: nothing public
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import problem, target
from pallas_kernels.tpu import config
from pallas_kernels.visit import TileSizes


@contextlib.contextmanager
def interpreted(
    queries: int = 128,
    keys: int = 128,
    *,
    tiles_a_step: int | None = None,
    chunked: bool = False,
    turned: bool = True,
    generation: str = "v5p",
) -> Iterator[None]:
    """Makes `implementation="tpu"` run here, and holds it to having no races.

    Memory starts as NaN. The rest is how the kernels are laid out:

    Args:
      queries: of a tile.
      keys: of a tile.
      tiles_a_step: None: as many as go.
      chunked: keys don't fit into VMEM, so that every query tile's keys are a chunk.
      turned: a turned bias fits.
      generation: of the TPU.
    """

    def layout(generation, block, length, head_dim, itemsize):
        chunks = length // block.queries if chunked else 1
        return turned, chunks, chunks

    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    block = TileSizes(queries, keys)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (config, "block", lambda *_: block),
            (config, "layout", layout),
        ):
            stack.enter_context(unittest.mock.patch.object(owner, name, value))
        if tiles_a_step is not None:
            steps = unittest.mock.patch.object(config, "tiles_a_step", lambda *_: tiles_a_step)
            stack.enter_context(steps)
        stack.enter_context(target.compile_for(generation))
        stack.enter_context(problem.options(interpret=parameters))
        try:
            yield
        except BaseException:
            pltpu.reset_tpu_interpret_mode_state()
            raise
    races = interpret_pallas_call.races
    assert races is None or not races.races_found
