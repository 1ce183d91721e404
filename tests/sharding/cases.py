"""Meshes of eight devices, and a model and a batch small enough for all of them."""

import numpy as np

from lazyattn.experiment.training import OptimizerConfig
from lazyattn.sharding import MeshConfig
from tests.model.tiny import make_config

# Every axis alone, and mixes.
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=4),
    "sequence": MeshConfig(data=1, sequence=8),
    "data_fsdp_tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp_sequence": MeshConfig(data=1, fsdp=2, sequence=4),
    "tensor_sequence": MeshConfig(data=1, tensor=2, sequence=4),
    "fsdp_tensor_sequence": MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
    "data_fsdp_sequence": MeshConfig(data=2, fsdp=2, sequence=2),
}

VOCAB, LENGTH, ROWS = 40, 48, 8
# Adam divides by the root of a mean square: with eps near 0, rounding alone would turn
# the sign of an update whose gradient is near 0.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=4, eps=1e-6)


def model(variant="lazy", **settings):
    """Returns a model whose sizes all of `MESHES` divide."""
    attention = {"num_heads": 8, "num_kv_heads": 4, "implementation": None, "bias_width": 10}
    settings = {"vocab_size": VOCAB, "width": 32, "mlp_width": 48, **settings}
    return make_config(variant, attention=attention, **settings)


def batch(seed):
    """Returns rows of packed documents, some ending in padding."""
    random = np.random.default_rng(seed)
    inputs, targets = random.integers(VOCAB, size=(2, ROWS, LENGTH))
    segment_ids = 1 + np.cumsum(random.random((ROWS, LENGTH)) < 0.08, axis=1)
    segment_ids[::3, LENGTH - 5 :] = 0
    starts = np.diff(segment_ids, axis=1, prepend=-1) != 0
    index = np.arange(LENGTH)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    data = {
        "inputs": inputs,
        "targets": targets,
        "segment_ids": segment_ids,
        "positions": positions,
    }
    return {name: array.astype(np.int32) for name, array in data.items()}
