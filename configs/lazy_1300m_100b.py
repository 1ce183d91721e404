"""A 1.3B model on 100B tokens with our `sharp_norm` attention; ours, not the paper's.

python train.py --config=configs/lazy_1300m_100b.py --workdir=DIR --config.data.path=FOLDER
"""

import ml_collections

from lazyattn.recipes import recipe


def get_config(attention: str = "sharp_norm") -> ml_collections.ConfigDict:
    """Returns the run; `attention` as in `lazyattn.experiment.with_attention`."""
    return recipe("1300m", "100b", attention)
