"""No rotation by position: the distance bias alone tells where a key is."""

import ml_collections

from lazyattn.recipes import recipe


def get_config(attention: str = "paper") -> ml_collections.ConfigDict:
    """Returns the ablated 340M run of the recipe `attention`."""
    config = recipe("340m", "10b", attention)
    config.model.attention.rope = False
    return config
