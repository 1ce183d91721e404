"""Trained at length 512, to be evaluated at 1024 and 2048 (the paper's length extrapolation).

The paper's model unless another attention is named: its bias table is wider than the
training length, so that what it holds past 512 is never trained; `:sharp` learns a slope.

python train.py --config=configs/length_extrapolation_512.py --workdir=DIR --config.data.path=FOLDER
"""

import ml_collections

from lazyattn.recipes import recipe


def get_config(attention: str = "paper") -> ml_collections.ConfigDict:
    """Returns the run; `attention` as in `lazyattn.experiment.with_attention`."""
    return recipe("340m", "10b", attention, sequence_length=512)
