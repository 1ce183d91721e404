"""Tau starts at -0.5, as in the authors' training branch, not at the paper's -1."""

import ml_collections

from lazyattn.recipes import recipe


def get_config(attention: str = "paper") -> ml_collections.ConfigDict:
    """Returns the ablated 340M run of the recipe `attention`."""
    config = recipe("340m", "10b", attention)
    config.model.attention.offset_init = -0.5
    return config
