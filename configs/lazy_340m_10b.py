"""The 340M model on 10B tokens with our `sharp_norm` attention.

python train.py --config=configs/lazy_340m_10b.py --workdir=DIR --config.data.path=FOLDER
"""

import ml_collections

from lazyattn.recipes import recipe


def get_config(attention: str = "sharp_norm") -> ml_collections.ConfigDict:
    """Returns the run; `attention` as in `lazyattn.experiment.with_attention`."""
    return recipe("340m", "10b", attention)
