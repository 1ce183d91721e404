"""What a launch is made with."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """What all kernels are made with.

    Attributes:
      warpgroups: how many compute; each has 64 rows of the CTA's own operand.
      stages: tiles of each other operand that are fetched ahead.
      in_registers: the CTA's own operand is kept in registers rather than read from SMEM
        again and again.
      ahead: a step's tiles are waited for during the step before.
    """

    warpgroups: int = 2
    stages: int = 2
    in_registers: bool = True
    ahead: bool = False

    @property
    def rows(self) -> int:
        """Queries, or keys, of a CTA."""
        return 64 * self.warpgroups

    @property
    def registers(self) -> int:
        """Registers of a thread that computes."""
        # All threads start with the same number, a multiple of 8, and only trade what they
        # have then: asking for more would wait for ever, and so would an increase to less.
        groups = self.warpgroups + 1
        at_start = self.registers_at_start
        most = (at_start * groups - self.fetch_registers) // self.warpgroups // 8 * 8
        return min(max(240, at_start), most)

    @property
    def registers_at_start(self) -> int:
        """Registers of every thread when the CTA starts."""
        return min(65536 // (128 * (self.warpgroups + 1)) // 8 * 8, 248)

    @property
    def fetch_registers(self) -> int:
        """Registers of a thread that fetches."""
        return 24 if self.warpgroups <= 2 else 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tunings:
    """The tunings of all kernels for one kind of call.

    Attributes:
      inference: forward pass without residuals.
      forward: forward pass with residuals.
      backward_dq: dQ.
      backward_dkv: dK and dV.
      backward_dbias: gradient of the bias table; None: dK's kernel finds it on its way.
      backward_dv: dV; None: dK's kernel finds it.
    """

    inference: Tuning
    forward: Tuning
    backward_dq: Tuning = Tuning(stages=3)
    backward_dkv: Tuning = Tuning(stages=3)
    backward_dbias: Tuning | None = Tuning(stages=4)
    backward_dv: Tuning | None = None


# By head size.
_TUNINGS = {
    64: Tunings(
        inference=Tuning(warpgroups=3, stages=4, ahead=True),
        forward=Tuning(warpgroups=3, stages=4, ahead=True),
        backward_dq=Tuning(stages=4),
        backward_dkv=Tuning(stages=3, ahead=True),
        backward_dbias=Tuning(warpgroups=3, stages=3),
    ),
    96: Tunings(
        inference=Tuning(warpgroups=3, stages=4, ahead=True),
        forward=Tuning(warpgroups=3, stages=3, in_registers=False, ahead=True),
        backward_dq=Tuning(stages=3, in_registers=False),
        backward_dkv=Tuning(stages=3, in_registers=False),
        backward_dbias=Tuning(warpgroups=3),
    ),
    128: Tunings(
        inference=Tuning(warpgroups=3, stages=4, in_registers=False, ahead=True),
        forward=Tuning(warpgroups=3, stages=4, in_registers=False),
        backward_dq=Tuning(stages=3, in_registers=False, ahead=True),
        backward_dkv=Tuning(stages=3, in_registers=False),
        backward_dbias=Tuning(warpgroups=3),
    ),
    # dK and dV of 64 keys would be 256 registers a thread.
    256: Tunings(
        inference=Tuning(in_registers=False),
        forward=Tuning(in_registers=False),
        backward_dq=Tuning(stages=1, in_registers=False),
        backward_dkv=Tuning(stages=1, in_registers=False),
        backward_dv=Tuning(in_registers=False),
        backward_dbias=Tuning(stages=1),
    ),
}
# Head sizes above this one have no softmax of their own, see `is_elastic`, and no smaller tunings
# for longer tables.
_MAX_HEAD_DIM_OF_SOFTMAX = 128
# By head size, what is otherwise without an offset.
_SOFTMAX: dict[int, dict[str, Tuning]] = {
    64: {"backward_dq": Tuning(stages=3)},
    96: {"forward": Tuning(stages=3, ahead=True)},
    128: {"forward": Tuning(stages=3, in_registers=False, ahead=True)},
}
# By head size, dK's kernel when it has room for the gradient of the bias table.
_KEY_WITH_BIAS = {
    64: Tuning(stages=3),
    96: Tuning(stages=3, in_registers=False),
    128: Tuning(in_registers=False),
}

# Where dS's diagonals are added up: rows of a tile at a time, a quarter of them, and words from
# one row to the next.
DIAGONALS_ROWS, DIAGONALS_PITCH = 16, 65

# Where dK's kernel adds dS up over distances, see `diagonals.py`: words from one of a warp's 8
# rows to the next, which lie askew, and of all of them; the last lanes read 128 of the last row.
SKEW_PITCH = 84
SKEW_WORDS = 7 * SKEW_PITCH + 132

# Bytes of what is known of 64 queries.
_ROW_STATS = 4 * 64 * 4
# Entries around a bias table.
_AROUND_TABLE = 640
# Bytes of shared memory a CTA may have, less what barriers, a tile of ones and alignment take.
_SHARED_MEMORY = 227 * 1024 - 4096


def padded_head_dim(head_dim: int) -> int:
    """Returns the head size that the kernels compute with, for one of at most 256."""
    return next(d for d in _TUNINGS if d >= head_dim)


def is_elastic(head_dim: int, given: bool) -> bool:
    """Returns whether a call is Elastic-Softmax to the kernels.

    It is, if an offset is `given`; and where they have no softmax of their own, for padded head
    sizes above 128, with tau 0.
    """
    return given or head_dim > _MAX_HEAD_DIM_OF_SOFTMAX


def tunings(head_dim: int, width: int, has_offset: bool = True) -> Tunings:
    """Returns the tunings for a padded head size and a bias table; width 0: there is none."""
    found = _usual(head_dim, has_offset)
    with_bias = _KEY_WITH_BIAS.get(head_dim)
    if with_bias is not None and width > 0:
        tiles = key_tiles(with_bias, head_dim, width)
        if tiles + _table_bytes(width) <= _SHARED_MEMORY:
            found = dataclasses.replace(found, backward_dkv=with_bias, backward_dbias=None)
    if width > _widest_table(found, head_dim, has_offset):
        found = _smaller(found, head_dim)
    if not has_offset:
        # Without what an offset needs in between, ptxas puts dS where the CTA's own
        # operand is and never brings that back: `benchmarks.machine_code` finds it out.
        in_smem = {
            name: dataclasses.replace(getattr(found, name), in_registers=False)
            for name in ("backward_dq", "backward_dkv")
        }
        found = dataclasses.replace(found, **in_smem)
    return found


def table_slots(tiles: int, table_rows: int) -> int:
    """Returns how many bias tables a kernel has room for beside so many bytes of tiles: 2, or 1.

    With two, the next work tile's is fetched while one is in use.
    """
    return 2 if tiles + 2 * 512 * table_rows <= _SHARED_MEMORY else 1


def forward_tiles(tuning: Tuning, head_dim: int, outputs: int) -> int:
    """Returns the bytes of SMEM that the tiles of the forward pass take.

    `outputs` are arrays of the query's size that it writes.
    """
    own = outputs + tuning.in_registers
    return (own * tuning.rows + 2 * tuning.stages * 64) * 2 * head_dim


def query_tiles(tuning: Tuning, head_dim: int, has_offset: bool = True) -> tuple[int, int]:
    """Returns the bytes of SMEM that the tiles of dQ's kernel take, and how many of the output
    and its rounding, which it wants without an offset, are fetched ahead."""
    outputs = 0 if has_offset else 2 if head_dim <= 64 else 1
    own = 2 + tuning.in_registers + outputs
    return (own * tuning.rows + 2 * tuning.stages * 64) * 2 * head_dim, outputs


def key_tiles(tuning: Tuning, head_dim: int, width: int = 0, own: int = 2) -> int:
    """Returns the bytes of SMEM that the tiles of the kernel of dK and dV take.

    `width` is that of the bias table, if the kernel also finds its gradient; `own` are operands
    that are the CTA's own.
    """
    tiles = (own * (1 + tuning.in_registers) * tuning.rows + 2 * tuning.stages * 64) * 2 * head_dim
    if width:
        warp = SKEW_WORDS + near_words(distances(width))
        tiles += 4 * tuning.warpgroups * 4 * warp
    return tiles + tuning.stages * _ROW_STATS


def distances(width: int) -> int:
    """Returns how many distances of tiles have an entry inside a bias table."""
    return (width + 62) // 64 + 1


def near_words(distances: int) -> int:
    """Returns the words of SMEM that a warp's sums take, for so many distances of tiles.

    They begin 16 before distance 0 of its last row, and the last lanes write 48 too many.
    """
    return 64 * distances + 64


def bias_tiles(tuning: Tuning, head_dim: int) -> int:
    """Returns the bytes of SMEM that the tiles of dbias's kernel take."""
    keys = tuning.stages + tuning.warpgroups - 1
    sums = tuning.warpgroups * DIAGONALS_ROWS * DIAGONALS_PITCH * 4
    return 2 * (tuning.stages + keys) * 64 * 2 * head_dim + tuning.stages * _ROW_STATS + sums


def widest_table(head_dim: int) -> int:
    """Returns the longest bias table that fits into shared memory beside the tiles."""
    widest = []
    for given in (True, False):
        offset = is_elastic(head_dim, given)
        found = _usual(head_dim, offset)
        kinds = (found, _smaller(found, head_dim))
        widest.append(max(_widest_table(x, head_dim, offset) for x in kinds))
    return min(widest)


def _usual(head_dim: int, has_offset: bool) -> Tunings:
    """Returns tunings for the usual table."""
    found = _TUNINGS[head_dim]
    return found if has_offset else dataclasses.replace(found, **_SOFTMAX[head_dim])


def _smaller(found: Tunings, head_dim: int) -> Tunings:
    """Returns tunings that leave more room for the bias table."""
    if head_dim > _MAX_HEAD_DIM_OF_SOFTMAX:
        return found
    fewer = {
        name: dataclasses.replace(getattr(found, name), stages=3)
        for name in ("inference", "forward")
    }
    fewer["backward_dq"] = dataclasses.replace(found.backward_dq, warpgroups=2)
    return dataclasses.replace(found, backward_dbias=Tuning(), **fewer)


def _widest_table(found: Tunings, head_dim: int, has_offset: bool) -> int:
    used = [
        forward_tiles(found.inference, head_dim, 1),
        # Out, and without an offset its rounding.
        forward_tiles(found.forward, head_dim, 1 if has_offset else 2),
        query_tiles(found.backward_dq, head_dim, has_offset)[0],
        key_tiles(found.backward_dkv, head_dim),
    ]
    if found.backward_dv is not None:
        used.append(key_tiles(found.backward_dv, head_dim, own=1))
    if found.backward_dbias is not None:
        used.append(bias_tiles(found.backward_dbias, head_dim))
    return ((_SHARED_MEMORY - max(used)) // 8 - _AROUND_TABLE) // 128 * 128


def _table_bytes(width: int) -> int:
    # A table is held twice, with some entries around it: see `plan.Plan.table`.
    return 8 * (-(-width // 128) * 128 + _AROUND_TABLE)
