"""A softmax model of the Hugging Face hub is taught to be lazy.

python train.py --config=configs/uptrain.py:FOLDER --workdir=DIR --config.data.path=SHARDS
python train.py --config=configs/uptrain.py:FOLDER+softmax --workdir=DIR ...    # the control
"""

import ml_collections

from lazyattn.pretrained.take_over import teach


def get_config(name: str = "") -> ml_collections.ConfigDict:
    """Returns the run; `name` as in `lazyattn.pretrained.take_over.teach`."""
    return teach(name)
