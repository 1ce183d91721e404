"""A folder of made-up tokens, and settings of a tiny model."""

import json
import lzma

import numpy as np

TINY = (
    ("model.vocab_size", "300"),
    ("model.width", "16"),
    ("model.num_layers", "1"),
    ("model.mlp_width", "16"),
    ("model.compute_dtype", "float32"),
    ("model.attention.num_heads", "2"),
    ("model.attention.bias_width", "16"),
    ("model.attention.implementation", "xla"),
)


def write_tokens(folder):
    folder.mkdir()
    random = np.random.default_rng(0)

    def text(size, every):
        tokens = random.integers(3, 300, size).astype(np.uint16)
        tokens[every - 1 :: every] = 2
        tokens[-1] = 2
        return tokens

    for number in range(2):
        packed = lzma.compress(text(2000, 90).tobytes())
        (folder / f"train-{number:02d}.u16.xz").write_bytes(packed)
    for name, every in (("rfc", 300), ("code", 60), ("books", 40)):
        np.save(folder / f"val_{name}.npy", text(700, every))
    (folder / "meta.json").write_text(json.dumps({"eos": 2, "vocab_size": 300}))
    return str(folder)
