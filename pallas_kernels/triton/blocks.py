"""Block sizes by GPU, bytes of an input number and head size; see `config.py`.

Of each kernel: queries and keys of a tile, warps, pipeline stages. Written by
benchmarks/tune_triton.py.
"""

TABLE = """
GPU   bytes head  inference       forward         backward_dq     backward_dkv    backward_dbias
sm_80     2   32   64  64  4  3    64  64  4  3    64  64  4  3    64  64  4  2    64  64  4  3
sm_80     2   64   64  64  4  3    64  64  4  3    64  64  4  3    32  64  4  3    64  64  4  3
sm_80     2  128  128  64  8  3    64  32  4  3    64  32  4  3    32  64  4  2    64  32  4  3
sm_80     2  256   64  64  8  2    64  32  8  2    64  32  8  2    64  32  8  2    64  32  8  2
sm_80     4   32   16  16  8  1    32  32  8  1    32  32  8  1    32  32  8  1    32  32  8  1
sm_80     4   64   32  32  8  1    32  32  8  1    32  32  8  1    32  32  8  1    32  32  8  1
sm_80     4  128   16  16  8  1    16  16  8  1    16  16  8  1    16  16  8  1    16  16  8  1
sm_80     4  256   16  16  8  1    16  16  8  1    16  16  8  1    16  16  8  1    16  16  4  1
sm_89     2   32   64  64  4  3    64  64  4  3    64  64  4  3    64  64  4  2    64  64  4  3
sm_89     2   64   64  64  4  3    64  64  4  3    64  64  4  3    32  64  4  3    64  64  4  3
sm_89     2  128  128  64  8  3    64  32  4  3    64  32  4  3    64  64  8  2    64  32  4  3
sm_89     2  256   64  32  8  2    64  32  8  2    32  32  8  2    32  32  8  2    32  32  8  2
sm_89     4   32   16  16  8  1    32  32  8  1    32  32  8  1    32  32  8  1    32  32  8  1
sm_89     4   64   32  32  8  1    32  32  8  1    32  32  8  1    32  32  8  1    32  32  8  1
sm_89     4  128   16  16  8  1    16  16  8  1    16  16  8  1    16  16  8  1    16  16  8  1
sm_89     4  256   16  16  8  1    16  16  8  1    16  16  8  1    16  16  8  1    16  16  4  1
sm_90     2   32   64  64  4  3    64  64  4  3    64  64  4  3    64  64  4  2    64  64  4  3
sm_90     2   64   64  64  4  3    64  64  4  3    64  64  4  3    64  64  4  3    64  64  4  2
sm_90     2  128  128  32  8  3    64  64  4  3    64  64  4  2    32  64  4  3    64  64  4  3
sm_90     2  256   64  64  8  2    64  32  8  2    64  32  8  2    64  32  8  2    64  32  8  2
sm_90     4   32   16  16  8  1    32  32  8  1    32  32  8  1    32  32  8  1    32  32  8  1
sm_90     4   64   32  32  8  1    32  32  8  1    32  32  8  1    32  32  8  1    32  32  8  1
sm_90     4  128   16  16  8  1    16  16  8  1    16  16  8  1    16  16  8  1    16  16  8  1
sm_90     4  256   16  16  8  1    16  16  8  1    16  16  8  1    16  16  8  1    16  16  4  1
"""


def _parsed(table: str) -> dict[tuple[str, int, int], dict[str, tuple[int, int, int, int]]]:
    head, *lines = (line.split() for line in table.strip().splitlines())
    found = {}
    for kind, itemsize, head_dim, *cells in lines:
        sizes = [int(cell) for cell in cells]
        of_kernels = zip(head[3:], *(sizes[n::4] for n in range(4)), strict=True)
        found[kind, int(itemsize), int(head_dim)] = {
            kernel: (queries, keys, warps, stages)
            for kernel, queries, keys, warps, stages in of_kernels
        }
    return found


BLOCKS = _parsed(TABLE)
