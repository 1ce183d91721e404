"""What a launch is made with: tile sizes, and how many keys stay in VMEM at a time."""

import dataclasses

from pallas_kernels.visit import TileSizes

LANES = 128
_MIB = 2**20

# Generations whose schedules are best, at the tiles below, in the order of `Plan.query_first`.
QUERY_FIRST = ("v5e", "v5p")

# Bytes of VMEM a core has.
VMEM = {"v4": 16 * _MIB, "v5e": 128 * _MIB, "v5p": 64 * _MIB, "v6e": 128 * _MIB, "7x": 64 * _MIB}
# Of it, what the compiler may use, and what a launch is planned to need at most.
_LIMIT = 0.94
_PLANNED = 0.80
# Up to this length keys are rather cut into more chunks, twice as many at most, than a bias
# not turned.
_TURNED_LENGTH = 16384
# Bytes of queries of one step, as many tiles as that makes: a step has a price of its own.
_STEP_BYTES = {"v4": _MIB // 8, "v5e": _MIB, "v5p": _MIB, "v6e": _MIB, "7x": _MIB}
# Bytes of scalar memory that tile ranges may take.
SMEM_FOR_RANGES = 512 * 1024


# (generation, head size) -> queries and keys of a tile, both multiples of 128 and queries of
# keys. Chosen by bundles of the final
# schedule, see `benchmarks/tpu_static.py`.
_BLOCKS: dict[tuple[str, int], tuple[int, int]] = {
    ("v4", 64): (256, 256),
    ("v4", 128): (256, 256),
    ("v4", 256): (256, 128),
    ("v5e", 64): (512, 256),
    ("v5e", 128): (512, 256),
    ("v5e", 256): (256, 256),
    ("v5p", 64): (512, 256),
    ("v5p", 128): (512, 256),
    ("v5p", 256): (256, 256),
    ("v6e", 64): (512, 256),
    ("v6e", 128): (512, 256),
    ("v6e", 256): (512, 256),
    ("7x", 64): (512, 256),
    ("7x", 128): (512, 256),
    ("7x", 256): (512, 256),
}


@dataclasses.dataclass(frozen=True)
class Strips:
    """Keys of a tile that vector units work on at a time, see `buffers`.

    Attributes:
      large: of the forward pass.
      small: of a second sweep that leaves residuals.
      backward: of the backward pass.
    """

    large: int
    small: int
    backward: int


def strips(turned: bool, queries: int) -> Strips:
    """Returns the strips of a launch, chosen by bundles and spills of the final schedules.

    Args:
      turned: whether VMEM holds a turned bias. Where it does not, every strip of the
        backward pass pays for turning its gradient, so that there must be few.
      queries: of a tile; strips have as many numbers whatever that is.
    """
    most = LANES // 2
    more = max(1, 512 // queries)
    large, small = min(32 * more, most), min(16 * more, most)
    return Strips(large=large, small=small, backward=small if turned else most)


def padded_head_dim(head_dim: int) -> int:
    """Returns the head size the kernels see."""
    return 64 if head_dim <= 64 else -(-head_dim // LANES) * LANES


def block(generation: str, itemsize: int, head_dim: int, length: int) -> TileSizes:
    """Returns the tiles for a call; a short sequence gets small ones."""
    queries, keys = _BLOCKS[generation, padded_head_dim(head_dim)]
    if itemsize == 4:
        queries, keys = min(queries, 256), min(keys, 128)
    while queries >= 2 * LANES and queries // 2 >= length:
        queries //= 2
    return TileSizes(queries, min(keys, queries))


def tiles_a_step(
    generation: str, block: TileSizes, length: int, head_dim: int, itemsize: int
) -> int:
    """Returns the tiles of queries of one step, a divisor of all there are."""
    tiles = length // block.queries
    most = max(1, min(tiles, _STEP_BYTES[generation] // (block.queries * head_dim * itemsize)))
    return max(n for n in range(1, most + 1) if tiles % n == 0)


def refusal(
    generation: str, batch: int, heads: int, length: int, head_dim: int, itemsize: int
) -> str | None:
    """Returns which memory a call would not fit into, as the end of "... since ..."."""
    tiles = block(generation, itemsize, head_dim, length)
    query_tiles = -(-length // tiles.queries)
    scalars = 2 * 4 * batch * heads * query_tiles
    if scalars > SMEM_FOR_RANGES:
        return (
            f"the tile ranges of {batch} x {heads} heads at length {length} take {scalars} bytes"
            f" of scalar memory, above {SMEM_FOR_RANGES}"
        )
    padded = query_tiles * tiles.queries
    try:
        layout(generation, tiles, padded, padded_head_dim(head_dim), itemsize)
    except ValueError as error:
        return str(error)
    return None


def vmem_limit(generation: str) -> int:
    """Returns the bytes of VMEM the compiler may use."""
    return int(_LIMIT * VMEM[generation])


def layout(
    generation: str, block: TileSizes, length: int, head_dim: int, itemsize: int
) -> tuple[bool, int, int]:
    """Returns whether VMEM holds a turned bias, and the chunks forward and backward.

    Arguments and errors as those of `key_chunks`. Turned if it fits without more chunks
    than otherwise.
    """

    def chunks(turned: bool) -> tuple[int, int]:
        forward, backward = (
            key_chunks(
                generation, block, length, head_dim, itemsize, backward=backward, turned=turned
            )
            for backward in (False, True)
        )
        return forward, backward

    plain = chunks(False)
    try:
        turned = chunks(True)
    except ValueError:
        return False, *plain
    return (True, *turned) if turned == plain or length <= _TURNED_LENGTH else (False, *plain)


def key_chunks(
    generation: str,
    block: TileSizes,
    length: int,
    head_dim: int,
    itemsize: int,
    *,
    backward: bool,
    turned: bool,
) -> int:
    """Returns into how many chunks the keys are cut so that one fits into VMEM.

    Length and head size are padded; with `turned` VMEM holds a turned bias too, see `tile.Bias`.

    Raises:
      ValueError: if not even a chunk of one query tile's keys fits.
    """
    tiles = length // block.queries
    budget = _PLANNED * VMEM[generation]
    for chunks in range(1, tiles + 1):
        if tiles % chunks:
            continue
        need = vmem_bytes(
            block,
            length,
            length // chunks,
            head_dim,
            itemsize,
            backward=backward,
            turned=turned,
            step_queries=block.queries
            * tiles_a_step(generation, block, length, head_dim, itemsize),
        )
        if need <= budget:
            return chunks
    raise ValueError(
        f"tiles of {block.queries} queries x {block.keys} keys need {need / _MIB:.0f} MiB of VMEM"
        f" at length {length} and head_dim {head_dim}, and a TPU {generation} allows"
        f" {budget / _MIB:.0f} MiB"
    )


def vmem_bytes(
    block: TileSizes,
    length: int,
    chunk: int,
    head_dim: int,
    itemsize: int,
    *,
    backward: bool,
    turned: bool,
    step_queries: int,
) -> int:
    """Returns the bytes of VMEM a launch is planned to need; arguments as above."""
    queries, keys = block.queries, block.keys
    twice = 2  # Blocks are fetched ahead.
    row = 8 * step_queries * 4
    bias = 8 * (length + queries) * 4
    tile = queries * keys
    of_query = head_dim * step_queries * itemsize
    # Keys and values, in the backward pass keys both ways up; lanes are padded.
    upright = chunk * -(-head_dim // LANES) * LANES * itemsize
    lying = head_dim * chunk * itemsize
    need = twice * ((2 * upright + lying) if backward else (upright + lying)) + twice * bias
    if turned:
        need += ((2 if backward else 1) * LANES + 16) * (length + queries + LANES) * 4
    if backward:
        need += twice * 2 * chunk * max(head_dim, LANES) * 4
        need += twice * bias + twice * 6 * of_query + head_dim * queries * 4
        need += twice * 5 * row + twice * (2 * 4 + 2 * itemsize) * tile
    else:
        need += twice * 4 * of_query + 2 * head_dim * queries * 4
        need += twice * 4 * row + 8 * row + twice * (4 + 2 * itemsize) * tile
        need += 8 * (length // keys) * queries * 4
    return need
