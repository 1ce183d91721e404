"""Neither: ordinary attention, as configs/softmax_340m_10b.py."""

import ml_collections

from lazyattn.recipes import recipe


def get_config(attention: str = "paper") -> ml_collections.ConfigDict:
    """Returns the ablated 340M run of the recipe `attention`."""
    return recipe("340m", "10b", f"{attention}+softmax")
