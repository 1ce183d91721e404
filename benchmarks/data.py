"""Times reading: tokenised shards to packed batches, by packing and number of workers.

    python -m benchmarks.data
    python -m benchmarks.data --path=DIR --lengths=512,2048,8192

Without `--path` it makes up shards in a temporary folder: documents whose lengths are
spread as those of web pages are, of tokens as unevenly frequent as words. Writes a
JSON file and a Markdown table. Tokens are targets: padding does not count.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import platform
import tempfile
import time

import numpy as np
from absl import app, flags

from benchmarks import provenance
from lazyattn import paths
from lazyattn.data import manifest, shards
from lazyattn.data.config import DataConfig
from lazyattn.data.manifest import Manifest, Split, TokenizerRecord
from lazyattn.data.pipeline import TrainingData, packing_report, prepare, train_iterator
from lazyattn.data.tokenizer import Tokenizer

# A process that only imports this keeps its own flags.
FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_PATH = paths.define(
    "path", None, "Folder of tokenised shards; default: made-up ones.", flag_values=FLAGS
)
_TOKENS = flags.DEFINE_integer("tokens", 20_000_000, "Of made-up shards.", flag_values=FLAGS)
_LENGTHS = flags.DEFINE_list("lengths", ["2048"], "Tokens a row.", flag_values=FLAGS)
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 65_536, "Tokens a batch.", flag_values=FLAGS)
_PACKINGS = flags.DEFINE_list(
    "packings", ["split", "first_fit"], "As data.packing.", flag_values=FLAGS
)
_WORKERS = flags.DEFINE_list("workers", ["0", "2"], "As data.num_workers.", flag_values=FLAGS)
_LONG = flags.DEFINE_string("long_documents", "split", "As data.long_documents.", flag_values=FLAGS)
_READ = flags.DEFINE_integer(
    "read", 20_000_000, "Tokens to read in each measurement.", flag_values=FLAGS
)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Measurements; the median counts.", flag_values=FLAGS)
_OUTPUT = paths.define("output", "benchmarks/results/data", "Without suffix.", flag_values=FLAGS)

_VOCABULARY = 32_000
_SHARDS = 8


@dataclasses.dataclass
class Result:
    """One line of the table.

    Attributes:
      length, batch_size, packing, num_workers: the settings.
      efficiency: share of all places that held a token, over the batches read.
      first_batch: seconds to the first batch, opening of files and workers included.
      tokens_per_second: median from the second batch on; then least and greatest.
      tokens_per_cpu_second: by the time this process was computing; None if others
        did the work.
    """

    length: int
    batch_size: int
    packing: str
    num_workers: int
    efficiency: float
    first_batch: float
    tokens_per_second: float
    least: float
    greatest: float
    tokens_per_cpu_second: float | None


def make_up(folder: pathlib.Path, tokens: int) -> int:
    """Writes shards of random documents; returns how many documents."""
    rng = np.random.default_rng(0)
    lengths = np.empty(0, np.int64)
    while lengths.sum() < tokens:
        more = np.clip(rng.lognormal(6.4, 1.0, 1000), 20, 100_000).astype(np.int64)
        lengths = np.concatenate([lengths, more])
    ids = np.minimum(3 + rng.zipf(1.2, lengths.sum()), _VOCABULARY - 1).astype(np.uint16)
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    tokenizer = Tokenizer.train(["a few words"], 300)  # any will do: nothing is decoded
    tokenizer.save(folder / "tokenizer.json")
    splits = {}
    for name, part in {"train": documents[100:], "validation": documents[:100]}.items():
        size = -(-len(part) // _SHARDS)
        written = [
            shards.write_shard(
                folder / shards.shard_name(name, i, _SHARDS),
                [(document, 4 * document.size) for document in part[i * size : (i + 1) * size]],
                "uint16",
            )
            for i in range(_SHARDS)
        ]
        splits[name] = Split(tuple(written))
    record = TokenizerRecord(
        kind="tokenizer.json",
        file="tokenizer.json",
        sha256=manifest.file_sha256(folder / "tokenizer.json"),
        vocab_size=_VOCABULARY,
        beginning_of_document=1,
        end_of_document=2,
        padding=0,
    )
    Manifest("benchmarks/data.py", record, "uint16", splits, (), {}, {}).write(folder)
    return len(documents)


def measure(data: TrainingData, config: DataConfig) -> Result:
    """Reads batches and times them."""
    places = config.batch_size * config.sequence_length
    batches = max(2, _READ.value // places)
    rates, cpu_rates, first_batches, filled = [], [], [], 0
    for _ in range(_ROUNDS.value):
        start = time.perf_counter()
        iterator = train_iterator(data, config)
        next(iterator)
        first_batches.append(time.perf_counter() - start)
        start, cpu_start, tokens = time.perf_counter(), time.process_time(), 0
        for batch in itertools.islice(iterator, batches):
            tokens += np.count_nonzero(batch["segment_ids"])
        rates.append(tokens / (time.perf_counter() - start))
        cpu_rates.append(tokens / (time.process_time() - cpu_start))
        filled += tokens
        iterator.close()
    return Result(
        length=config.sequence_length,
        batch_size=config.batch_size,
        packing=config.packing,
        num_workers=config.num_workers,
        efficiency=filled / (_ROUNDS.value * batches * places),
        first_batch=float(np.median(first_batches)),
        tokens_per_second=float(np.median(rates)),
        least=min(rates),
        greatest=max(rates),
        tokens_per_cpu_second=None if config.num_workers else float(np.median(cpu_rates)),
    )


def table(results: list[Result]) -> str:
    """Returns the results as Markdown."""
    lines = [
        "| length | batch | packing | workers | efficiency | first batch, s | million tokens/s |"
        " least, greatest | million tokens/s of CPU time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        cpu = "" if r.tokens_per_cpu_second is None else f"{r.tokens_per_cpu_second / 1e6:.1f}"
        lines.append(
            f"| {r.length} | {r.batch_size} | {r.packing} | {r.num_workers} | {r.efficiency:.1%} |"
            f" {r.first_batch:.2f} | {r.tokens_per_second / 1e6:.1f} |"
            f" {r.least / 1e6:.1f}, {r.greatest / 1e6:.1f} | {cpu} |"
        )
    return "\n".join(lines) + "\n"


def _run(path: str) -> None:
    results = []
    documents = tokens = 0
    for length, packing, workers in itertools.product(
        map(int, _LENGTHS.value), _PACKINGS.value, map(int, _WORKERS.value)
    ):
        config = DataConfig(
            path=path,
            sequence_length=length,
            batch_size=max(1, _BATCH_TOKENS.value // length),
            packing=packing,
            long_documents=_LONG.value,
            num_workers=workers,
        )
        data = prepare(config)
        documents = data.counts["train"].documents
        tokens = data.counts["train"].targets
        if not workers:
            print(packing_report(data, config)[0])
        results.append(measure(data, config))
        print(table(results[-1:]), flush=True)
    about = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "documents": documents,
        "tokens": tokens,
        "made_up": _PATH.value is None,
        "long_documents": _LONG.value,
        **provenance.made_by("benchmarks.data"),
        "results": [dataclasses.asdict(result) for result in results],
    }
    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    cores = f"{about['processor']}, {about['cores']} cores"
    head = f"{cores}; {documents:,} documents, {tokens:,} tokens to train on"
    output.with_suffix(".md").write_text(f"{head}\n\n{table(results)}")
    print(table(results))


def main(argv: list[str]) -> None:
    """Times every combination of the settings and writes what came out."""
    del argv
    if _PATH.value is not None:
        _run(_PATH.value)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_up(pathlib.Path(folder), _TOKENS.value)
        _run(folder)


if __name__ == "__main__":
    app.run(main)
