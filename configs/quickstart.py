"""A small model on the English that every Python carries: minutes on two cores.

python train.py --config=configs/quickstart.py --workdir=runs/quickstart
python train.py --config=configs/quickstart.py:softmax --workdir=runs/softmax
"""

import ml_collections

from lazyattn.experiment import defaults, with_attention


def get_config(attention: str = "sharp_norm") -> ml_collections.ConfigDict:
    """Returns the quickstart; `attention` as in `lazyattn.experiment.with_attention`."""
    config = defaults()

    config.model.vocab_size = 4096
    config.model.width = 192
    config.model.num_layers = 3
    config.model.tie_embeddings = True
    config.model.compute_dtype = "float32"
    config.model.loss_chunk = 2048
    config.model.attention.num_heads = 4
    config.model.attention.bias_width = 256

    config.data.source = "stdlib"
    config.data.vocab_size = 4096
    config.data.sequence_length = 256
    config.data.batch_size = 8
    config.data.streams_per_row = 16  # few rows, and some documents are long

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 40

    config.training.steps = 320
    config.training.log_every = 20
    config.training.eval_every = 80
    config.training.checkpoint_every = 40
    return with_attention(config, attention)
