"""A tokenizer of single letters, for models of a few dozen tokens."""

import numpy as np

from tests.model.tiny import VOCAB


class Letters:
    """A token a letter or space; 0 begins and 1 ends a sequence."""

    pad_id = bos_id = 0
    eos_id = 1
    vocab_size = VOCAB
    bytes_per_token = np.array([0, 0] + [1] * (VOCAB - 2), np.int32)

    def encode(self, text):
        return [VOCAB - 1 if letter == " " else ord(letter) - ord("a") + 2 for letter in text]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        ids = [i for i in ids if i > 1]
        return "".join(" " if i == VOCAB - 1 else chr(ord("a") + i - 2) for i in ids)

    def unsettled(self, ids):
        return 0
