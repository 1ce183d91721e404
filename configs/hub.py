"""A run that starts as a model of the Hugging Face hub, and may learn to be lazy.

python train.py --config=configs/hub.py:FOLDER --workdir=DIR
python train.py --config=configs/hub.py:FOLDER+sharp_table --workdir=DIR
"""

import ml_collections

from lazyattn.pretrained.take_over import take_over


def get_config(name: str = "") -> ml_collections.ConfigDict:
    """Returns the run; `name` as in `lazyattn.pretrained.take_over.take_over`."""
    return take_over(name)
