"""Block sizes by GPU, bytes of an input number and head size; see `config.py`.

Each row: queries and keys of a tile, warps, pipeline stages.
"""

BLOCKS: dict[tuple[str, int, int], dict[str, tuple[int, int, int, int]]] = {
    ("sm_90", 2, 64): {
        "inference": (128, 64, 8, 3),
        "forward": (128, 64, 8, 3),
        "backward_query": (64, 64, 4, 3),
        "backward_key": (64, 64, 4, 3),
        "backward_bias": (64, 64, 4, 3),
    },
}
