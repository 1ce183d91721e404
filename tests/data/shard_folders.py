"""Folders of tokenised shards, made without preparing anything."""

import random
from pathlib import Path

from lazyattn.data import manifest, shards
from lazyattn.data.manifest import Manifest, Split, TokenizerRecord
from lazyattn.data.tokenizer import Tokenizer

WORDS = "attention may look at nothing when no word is worth the weight of a glance"


def texts(number, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS.split(), k=draw.randint(0, 60))) for _ in range(number)]


def write_folder(folder: Path, seed=0, train=60, validation=15, per_shard=10, vocab_size=280):
    """Writes a folder; folders of one `vocab_size` have the same tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.train(texts(50, seed=99), vocab_size)
    tokenizer.save(folder / "tokenizer.json")
    written = texts(train + validation, seed)
    splits = {}
    for name, part in {"train": written[:train], "validation": written[train:]}.items():
        groups = [part[i : i + per_shard] for i in range(0, len(part), per_shard)]
        splits[name] = Split(
            tuple(
                shards.write_shard(
                    folder / shards.shard_name(name, i, len(groups)),
                    [(tokenizer.encode(text), len(text)) for text in group],
                    "uint16",
                )
                for i, group in enumerate(groups)
            )
        )
    record = TokenizerRecord(
        kind="tokenizer.json",
        file="tokenizer.json",
        sha256=manifest.file_sha256(folder / "tokenizer.json"),
        vocab_size=tokenizer.vocab_size,
        beginning_of_document=tokenizer.bos_id,
        end_of_document=tokenizer.eos_id,
        padding=tokenizer.pad_id,
    )
    Manifest("tests", record, "uint16", splits, (), {}, {}).write(folder)
    return folder
