"""Problems for tests of what needs no arrays."""

import dataclasses

from pallas_kernels.problem import Problem

_SMALL = Problem(
    length=256,
    heads=2,
    group=1,
    head_dim=64,
    value_dim=64,
    dtype="bfloat16",
    width=0,
    has_slope=False,
    has_offset=True,
    packed=False,
    scale=1.0,
    skip_mass=0.0,
)


def problem(**changes):
    """Returns a small problem, with changes."""
    return dataclasses.replace(_SMALL, **changes)
