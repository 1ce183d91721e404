"""Devices that stand in the mesh's order in one slice after the other."""

import numpy as np

from lazyattn.compile.chips import CHIPS
from lazyattn.compile.network import Network


def network(axis_sizes, shape, chip="v5p", slices=1):
    grid = np.stack(np.meshgrid(*map(np.arange, (slices, *shape)), indexing="ij"), -1)
    rows = grid.reshape(-1, len(shape) + 1)
    places = np.tile(np.arange(len(rows) // slices), slices)
    return Network(axis_sizes, np.roll(rows, -1, axis=1), places, shape, CHIPS[chip])
