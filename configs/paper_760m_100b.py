"""The paper's 760M model on 100B tokens: bias of standard deviation 0.02, no tail, tau from -1.

python train.py --config=configs/paper_760m_100b.py --workdir=DIR --config.data.path=FOLDER
"""

import ml_collections

from lazyattn.recipes import recipe


def get_config(attention: str = "paper") -> ml_collections.ConfigDict:
    """Returns the run; `attention` as in `lazyattn.experiment.with_attention`."""
    return recipe("760m", "100b", attention)
