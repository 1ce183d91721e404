"""What is measured of a trained model: losses, retrieval, tiles; all with programs made ahead."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from benchmarks.study import look, scorer
from benchmarks.study.data import Tokens, rows_of, whole_documents
from benchmarks.study.programs import SINK_SEQUENCES, Programs
from lazyattn.errors import InputError
from lazyattn.eval.by_position import position_edges
from lazyattn.eval.estimates import estimate
from lazyattn.eval.retrieval import (
    DISTANCES,
    SPAN,
    default_distances,
    measure_copy,
    measure_passkey,
    passkey_distances,
)
from lazyattn.inspect.sequences import LENGTH as SINK_LENGTH

# Rows of each distance, and the seed of what is in them: the same for all models.
COPY_ROWS, PASSKEY_ROWS, SEED = 64, 64, 17
# Rows of each set that are looked into.
LOOK_ROWS = 1


@dataclasses.dataclass(frozen=True)
class Material:
    """What a model is measured on.

    Attributes:
      length: tokens of a row in training.
      sets: validation texts by name.
      eos: ends a document.
      tokenizer: encodes the pass keys' sentences; None: keys of random tokens.
      looked: rows of one document each, by length.
      sequences: short ones, for the sink metric.
    """

    length: int
    sets: dict[str, np.ndarray]
    eos: int
    tokenizer: Any
    looked: dict[int, Int32[np.ndarray, "rows length"]]
    sequences: Int32[np.ndarray, "sequences length"]

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Row lengths that losses are measured at: the trained one, two and four times it."""
        return self.length, 2 * self.length, 4 * self.length


def material(tokens: Tokens, length: int, folder: str) -> Material:
    """Returns what models trained on rows of `length` are measured on."""
    eos = tokens.eos
    looked = {}
    for size in (length, 4 * length):
        parts = [whole_documents(x, size, eos, LOOK_ROWS) for x in tokens.validation.values()]
        rows = np.concatenate(parts)
        if not rows.size:  # no document is so long: rows of several, as if they were one
            whole = np.concatenate(list(tokens.validation.values()))
            rows = np.resize(whole, (1, size)).astype(np.int32)
        looked[size] = rows
    text = np.concatenate(list(tokens.validation.values()))
    text = text[text != eos]
    picked = np.random.default_rng(SEED).integers(
        0, max(1, text.size // SINK_LENGTH), SINK_SEQUENCES
    )
    sequences = np.take(
        text, picked[:, None] * SINK_LENGTH + np.arange(SINK_LENGTH), mode="wrap"
    ).astype(np.int32)
    return Material(
        length, tokens.validation, eos, _tokenizer(Path(folder).expanduser()), looked, sequences
    )


class _Encoder:
    def __init__(self, file: Path):
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def _tokenizer(folder: Path) -> _Encoder | None:
    file = folder / "tokenizer.json"
    return _Encoder(file) if file.exists() else None


def prepare(programs: Programs, found: Material, everything: bool) -> None:
    """Has the programs compiled that `measure` will want, in the background."""
    if not everything:
        programs.score(found.length)
        return
    for length, rows in found.looked.items():
        programs.look(len(rows), length)
    for length in found.lengths:
        programs.score(length)
    programs.sink()


def measure(programs: Programs, params: Any, found: Material, everything: bool) -> dict[str, Any]:
    """Returns the numbers of a line; see docs/study.md for what each is.

    Args:
      programs: of the model.
      params: its parameters.
      found: what to measure on.
      everything: False: the validation losses at the trained length alone.
    """
    line: dict[str, Any] = {}
    short, double, fourfold = found.lengths
    losses, positions = _losses(programs, params, found, short)
    line |= {f"val_{name}": value for name, value in losses.items()}
    line["val"] = _mean(losses)
    line["val_by_position"] = positions
    if not everything:
        return line
    for name, length in (("2x", double), ("4x", fourfold)):
        losses, positions = _losses(programs, params, found, length)
        line[f"val_{name}"] = _mean(losses)
        line[f"val_{name}_sets"] = losses
        line[f"val_{name}_by_position"] = positions
    line |= _retrieval(programs, params, found)
    for length, rows in found.looked.items():
        at = jax.device_get(_look(programs, params, rows))
        share = look.shares(at)
        size = 64  # what the Hopper kernels' visit ranges count in
        # Named by the lengths of the study, whatever a trial's are.
        label = 4096 if length == found.length else 16384
        line[f"visited_{label}"] = share[f"visited_{size}"]
        line[f"live_{label}"] = share[f"live_{size}"]
        line[f"tiles_{label}"] = share
        if length == found.length:
            visited = at[f"visited_{size}"].sum(1) / at[f"causal_{size}"].sum(1)
            line["visited_by_head"] = np.round(visited, 4).tolist()
            line["mass"] = float(
                at["mass"].sum() / (rows.size * at["mass"].shape[0] * at["mass"].shape[2])
            )
            line["zeros"] = float(at["zeros"].sum() / at["pairs"].sum())
            line["kurtosis"] = [round(float(x), 3) for x in at["kurtosis"]]
            line["largest_activation"] = [round(float(x), 3) for x in at["largest"]]
        else:
            line |= look.learned(at)
    short_rows = jax.device_get(programs.sink().result().run(params, programs.put(found.sequences)))
    line["sink"] = look.sink(short_rows)
    return line


def _look(programs: Programs, params: Any, rows: Int32[np.ndarray, "rows length"]) -> Any:
    return programs.look(*rows.shape).result().run(params, programs.put(rows))


def can_look(programs: Programs, found: Material) -> bool:
    """Returns whether `visited` need not wait for its program."""
    return programs.look(*found.looked[found.length].shape).done()


def visited(programs: Programs, params: Any, found: Material) -> Any:
    """Starts counting tiles at the trained length; `look.shares` takes what comes of it."""
    at = _look(programs, params, found.looked[found.length])
    return {name: x for name, x in at.items() if name.startswith(("causal", "visited", "live"))}


def scores(programs: Programs, params: Any, length: int) -> Callable[[np.ndarray], Any]:
    """Returns a function of any number of rows that gives nll, hit and context of each target."""
    program = programs.score(length).result().run
    size = scorer.rows(length)

    def score(rows: Int32[np.ndarray, "rows tokens"]) -> tuple[np.ndarray, ...]:
        parts = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            part = np.pad(part, ((0, size - len(part)), (0, 0)), mode="edge")
            parts.append(program(params, programs.put(part)))
        fetched = jax.device_get(parts)
        return tuple(np.concatenate(column)[: len(rows)] for column in zip(*fetched, strict=True))

    return score


def _losses(
    programs: Programs, params: Any, found: Material, length: int
) -> tuple[dict[str, float], list[list[float | None]]]:
    """Returns the loss by set, and over all sets by how much of its document a token sees.

    The latter as [first, last, nats, standard error] of each bucket.
    """
    rows = {name: rows_of(x, length, found.eos) for name, x in found.sets.items()}
    nll, _, context = scores(programs, params, length)(np.concatenate(list(rows.values())))
    losses, start = {}, 0
    for name, own in rows.items():
        part = slice(start, start + len(own))
        losses[name] = float(nll[part].sum(dtype=np.float64) / (context[part] > 0).sum())
        start += len(own)
    edges = position_edges(length)
    buckets: list[list[float | None]] = []
    for first, last in itertools.pairwise(edges):
        at = estimate(nll, (context > first) & (context <= last))
        if at.count:
            error = None if math.isnan(at.stderr) else at.stderr
            buckets.append([first + 1, last, at.mean, error])
    return losses, buckets


def _mean(losses: dict[str, float]) -> float:
    return sum(losses.values()) / len(losses)


def _retrieval(programs: Programs, params: Any, found: Material) -> dict[str, Any]:
    """Returns copying and pass keys by distance, as far as rows have room for them."""
    stream = np.concatenate(list(found.sets.values()))
    stream = stream[stream != found.eos].astype(np.int32)
    by_row = scores(programs, params, found.length)

    def score(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nll, hit, _ = by_row(rows)
        return nll, hit

    line: dict[str, Any] = {"copy": {}, "copy_error": {}, "passkey": {}, "passkey_nats": {}}
    length = found.length
    more: dict[str, Any] = {"rows": COPY_ROWS, "seed": SEED}
    span = min(SPAN, (length + 1) // 2)
    near = [x for x in DISTANCES if span <= x <= length + 1 - span]
    distances = near or list(default_distances(length, span))
    copied = measure_copy(score, stream, length, [*distances, None], span=span, **more)
    for distance, at in copied.items():
        name = "nothing" if distance is None else str(distance)
        line["copy"][name], line["copy_error"][name] = at.mean, at.stderr
    more = {"rows": PASSKEY_ROWS, "seed": SEED, "tokenizer": found.tokenizer}
    try:
        nearest, farthest = passkey_distances(stream, length, **more)
    except InputError:
        nearest, farthest = 1, 0
    distances = [x for x in DISTANCES if nearest <= x <= farthest]
    if nearest <= farthest:
        keys = measure_passkey(score, stream, length, distances or [farthest], **more)
        for distance, key in keys.items():
            line["passkey"][str(distance)] = key.right.mean
            line["passkey_nats"][str(distance)] = key.nats.mean
    return line
