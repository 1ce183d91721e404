"""Tokens of the study: read once, kept on the device, rows cut out of them by the step's number."""

import concurrent.futures
import dataclasses
import json
import lzma
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, UInt16

from lazyattn.call import document_positions
from lazyattn.errors import InputError, require
from lazyattn.model.objective import Batch

SETS = ("rfc", "code", "books")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A folder of tokens.

    Attributes:
      train: documents one after the other, each ended by `eos`.
      validation: likewise, by the name of the set.
      eos: id that ends a document.
      vocab_size: ids are below it.
      checksum: of `train`, CRC-32.
    """

    train: UInt16[np.ndarray, " tokens"]
    validation: dict[str, UInt16[np.ndarray, " tokens"]]
    eos: int
    vocab_size: int
    checksum: int


def read(folder: str) -> Tokens:
    """Reads a folder of `train-*.u16.xz`, `val_*.npy` and `meta.json`.

    Raises:
      InputError: if something is missing or broken.
    """
    path = Path(folder).expanduser()
    files = sorted(path.glob("train-*.u16.xz"))
    needed = [path / "meta.json", *(path / f"val_{name}.npy" for name in SETS)]
    missing = next((file.name for file in needed if not file.exists()), None)
    if not files:
        missing = "train-*.u16.xz"
    require(missing is None, "--data", folder, f"a folder that has {missing}")
    try:
        meta = json.loads(needed[0].read_text())
        with concurrent.futures.ThreadPoolExecutor() as pool:
            parts = list(pool.map(_unpack, files))
        validation = {name: np.load(path / f"val_{name}.npy") for name in SETS}
        eos, vocab = int(meta["eos"]), int(meta["vocab_size"])
    except (OSError, ValueError, KeyError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"--data: {folder} can't be read ({error}).") from None
    train = np.concatenate(parts)
    for name, tokens in {"train": train, **validation}.items():
        require(tokens.size > 1, f"--data's {name}", f"{tokens.size} tokens", "at least 2 tokens")
        require(int(tokens.max()) < vocab, f"--data's {name}", int(tokens.max()), f"below {vocab}")
    return Tokens(train, validation, eos, vocab, zlib.crc32(train))


def _unpack(file: Path) -> UInt16[np.ndarray, " tokens"]:
    return np.frombuffer(lzma.decompress(file.read_bytes()), "<u2")


@dataclasses.dataclass(frozen=True)
class Order:
    """Which rows a run sees.

    Attributes:
      starts: first token of each row.
      epochs: how often the text is gone through; above 1 there were too few rows.
    """

    starts: Int32[np.ndarray, "steps batch"]
    epochs: float


def order(tokens: int, length: int, steps: int, batch: int, seed: int) -> Order:
    """Returns rows in random order, in another one every time round.

    Args:
      tokens: of the text.
      length: tokens of a row, whose targets are one further on.
      steps, batch: of the run.
      seed: of the order.
    """
    rows = (tokens - 1) // length
    require(rows >= 1, "--data's train", f"{tokens} tokens", f"more than {length} tokens, a row")
    wanted = steps * batch
    rounds = [
        np.random.default_rng([seed, epoch]).permutation(rows)
        for epoch in range(-(-wanted // rows))
    ]
    starts = np.concatenate(rounds)[:wanted].astype(np.int32) * length
    return Order(starts.reshape(steps, batch), wanted / rows)


def cut(
    stream: Int[Array, " tokens"],
    starts: Int[Array, "steps batch"],
    step: Int[Array, ""],
    *,
    length: int,
    eos: int,
) -> Batch:
    """Returns the batch of a step."""
    rows = jax.vmap(lambda start: jax.lax.dynamic_slice(stream, (start,), (length + 1,)))
    return packed(rows(starts[step]).astype(jnp.int32), eos)


def packed(tokens: Int[Array, "rows tokens"], eos: int) -> Batch:
    """Returns rows as the model gets them, documents apart.

    A document's last token, `eos`, has no target: the next document's first token follows
    from nothing. It counts as padding (segment 0), like everything that has no target.

    Args:
      tokens: rows of one token more than the length.
      eos: ends a document.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    ends = inputs == eos
    before = jnp.cumsum(ends, axis=1, dtype=jnp.int32) - ends
    segment_ids = jnp.where(ends, 0, before + 1)
    return {
        "inputs": inputs,
        "targets": targets,
        "segment_ids": segment_ids,
        "positions": document_positions(segment_ids),
    }


def rows_of(
    tokens: UInt16[np.ndarray, " tokens"], length: int, eos: int
) -> Int32[np.ndarray, "rows tokens"]:
    """Returns a text as rows of `length` + 1 tokens, the last filled up with `eos`.

    Every token but the first is a target once, whatever the length.
    """
    rows = -(-(tokens.size - 1) // length)
    padded = np.full(rows * length + 1, eos, np.int32)
    padded[: tokens.size] = tokens
    return np.stack([padded[i * length : (i + 1) * length + 1] for i in range(rows)])


def whole_documents(
    tokens: UInt16[np.ndarray, " tokens"], length: int, eos: int, rows: int
) -> Int32[np.ndarray, "rows length"]:
    """Returns the first `length` tokens of up to `rows` documents that have so many."""
    ends = np.flatnonzero(tokens == eos)
    starts = np.concatenate([[0], ends[:-1] + 1]) if ends.size else np.zeros(1, int)
    sizes = (ends if ends.size else np.asarray([tokens.size])) - starts
    found = starts[sizes >= length][:rows]
    picked = [tokens[start : start + length] for start in found]
    return np.stack(picked).astype(np.int32) if picked else np.zeros((0, length), np.int32)
