"""One change each to the paper's 340M run, or to that of an attention named after a plus.

python train.py --config=configs/ablations.py:no_rope --workdir=DIR
python train.py --config=configs/ablations.py:no_rope+sharp_norm --workdir=DIR
"""

import ml_collections

from lazyattn.recipes import ablation


def get_config(name: str = "no_bias") -> ml_collections.ConfigDict:
    """Returns the changed run; `name` as in `lazyattn.recipes.ablation`."""
    return ablation(name)
