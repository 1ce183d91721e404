"""Runs on FineWeb-Edu, by name: a model's size, its tokens and its attention.

python train.py --config=configs/fineweb_edu.py:lazy_340m_10b --workdir=DIR
python train.py --config=configs/fineweb_edu.py:lazy_340m_10b+softmax --workdir=DIR
"""

import ml_collections

from lazyattn.recipes import run


def get_config(name: str = "lazy_340m_10b") -> ml_collections.ConfigDict:
    """Returns the run; `name` as in `lazyattn.recipes.run`."""
    return run(name)
