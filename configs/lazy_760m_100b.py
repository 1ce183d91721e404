"""The 760M model on 100B tokens with our `sharp_norm` attention.

python train.py --config=configs/lazy_760m_100b.py --workdir=DIR --config.data.path=FOLDER
"""

import ml_collections

from lazyattn.recipes import recipe


def get_config(attention: str = "sharp_norm") -> ml_collections.ConfigDict:
    """Returns the run; `attention` as in `lazyattn.experiment.with_attention`."""
    return recipe("760m", "100b", attention)
