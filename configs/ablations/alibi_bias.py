"""The distance bias starts as ALiBi's lines, with a learned slope past its table."""

import ml_collections

from lazyattn.recipes import recipe


def get_config(attention: str = "paper") -> ml_collections.ConfigDict:
    """Returns the ablated 340M run of the recipe `attention`."""
    config = recipe("340m", "10b", attention)
    config.model.attention.update(bias_kind="table", bias_init="alibi", bias_tail=True)
    return config
