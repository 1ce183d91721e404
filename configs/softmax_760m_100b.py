"""The softmax twin of paper_760m_100b and lazy_760m_100b: nothing else differs.

python train.py --config=configs/softmax_760m_100b.py --workdir=DIR --config.data.path=FOLDER
"""

import ml_collections

from lazyattn.recipes import recipe


def get_config(attention: str = "softmax") -> ml_collections.ConfigDict:
    """Returns the run; `attention` as in `lazyattn.experiment.with_attention`."""
    return recipe("760m", "100b", attention)
