"""Where every config starts: the defaults, and the attention by name.

python train.py --config=configs/base.py:paper --workdir=DIR
"""

import ml_collections

from lazyattn.errors import InputError
from lazyattn.experiment import defaults
from lazyattn.model.config import RECIPES, VARIANTS


def get_config(attention: str = "sharp") -> ml_collections.ConfigDict:
    """Returns the default experiment with one of the named kinds of attention."""
    return with_attention(defaults(), attention)


def with_attention(config: ml_collections.ConfigDict, names: str) -> ml_collections.ConfigDict:
    """Sets the kind of attention, and nothing else, so that runs can be compared.

    Args:
      config: what to change.
      names: recipes and variants (`lazyattn.model.config`) joined by "+", applied
        in turn, e.g. "sharp", "softmax" or "paper+lazy_no_bias".

    Returns:
      `config`.

    Raises:
      InputError: for an unknown name.
    """
    for name in names.split("+"):
        if name in RECIPES:
            config.model.attention.update(RECIPES[name])
        elif name in VARIANTS:
            config.model.attention.variant = name
        else:
            raise InputError(
                f"The attention {name!r} after the config file's colon is unknown; it must be one"
                f" of {', '.join([*RECIPES, *VARIANTS])}, or several joined by '+'."
            )
    return config
