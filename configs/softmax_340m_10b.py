"""The softmax twin of paper_340m_10b and lazy_340m_10b: nothing else differs.

python train.py --config=configs/softmax_340m_10b.py --workdir=DIR --config.data.path=FOLDER
"""

import ml_collections

from lazyattn.recipes import recipe


def get_config(attention: str = "softmax") -> ml_collections.ConfigDict:
    """Returns the run; `attention` as in `lazyattn.experiment.with_attention`."""
    return recipe("340m", "10b", attention)
