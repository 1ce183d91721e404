"""The paper's 340M model on 10B tokens: bias of standard deviation 0.02, no tail, tau from -1.

python train.py --config=configs/paper_340m_10b.py --workdir=DIR --config.data.path=FOLDER
"""

import ml_collections

from lazyattn.recipes import recipe


def get_config(attention: str = "paper") -> ml_collections.ConfigDict:
    """Returns the run; `attention` as in `lazyattn.experiment.with_attention`."""
    return recipe("340m", "10b", attention)
