"""The defaults, and the attention by name; other configs start from the same.

python train.py --config=configs/base.py:paper --workdir=DIR
"""

import ml_collections

from lazyattn.experiment import defaults, with_attention


def get_config(attention: str = "sharp_norm") -> ml_collections.ConfigDict:
    """Returns the default experiment with one of the named kinds of attention."""
    return with_attention(defaults(), attention)
