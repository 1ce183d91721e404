"""A corpus to a folder of tokenised shards; a killed run is taken up again.

Work in progress lies in a folder within the output: a plan, the tokenizer, and for
each unit its shards and then its result. What has a result is done. When all have,
the shards get their names and the manifest is written; only then is the output a
folder of shards.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from lazyattn import __version__, buckets
from lazyattn.allowed import at_least, check_settings
from lazyattn.data import copies, manifest
from lazyattn.data.manifest import Manifest, SourceFile, TokenizerRecord
from lazyattn.data.parquet import DamagedFileError
from lazyattn.data.prepare import assemble, workspace
from lazyattn.data.prepare.hub import is_hub
from lazyattn.data.prepare.inputs import HubOptions, Plan, make_plan
from lazyattn.data.prepare.progress import ProgressLine
from lazyattn.data.prepare.readers import read_unit
from lazyattn.data.prepare.selection import (
    LOW_SCORE,
    MISSING_ID,
    MISSING_TEXT,
    UNREADABLE,
    Selection,
    select,
)
from lazyattn.data.prepare.unit import UnitResult
from lazyattn.data.prepare.workers import process_all
from lazyattn.data.shards import token_dtype
from lazyattn.data.tokenizer import EOS, Tokenizer
from lazyattn.errors import InputError, require
from lazyattn.paths import ANYWHERE, check_local, local_path
from lazyattn.quantity import quantity

TRAIN = "train"  # as a tokenizer: learn one
# What to do where all documents are skipped for one reason.
_HELP = {
    MISSING_ID: "--id_field= goes by the hash of the text",
    MISSING_TEXT: "--text_field names the field of the text",
}


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What to prepare, and how.

    Attributes:
      inputs: folders, files or patterns of them, or datasets of the Hugging Face hub,
        `hf://datasets/OWNER/NAME`. What is in a bucket is copied to the user's cache.
      output: folder of the shards. For one in a bucket they are made in the user's cache.
      eos_token: name of the special token that ends a document; None: what the
        tokenizer's folder says, or a name that is known.
      hub_config: the configuration of datasets of the hub; None: the only or default one.
      hub_split: the split of them that `inputs` has; None: "train".
      hub_validation_split: the one that `validation_inputs` has; None: "validation".
      validation_inputs: as `inputs`, of held-out documents; (): a share of `inputs` is
        held out.
      tokenizer: path of a `tokenizer.json` or a SentencePiece model, of the folder that
        has it, or "train".
      vocab_size: entries of a tokenizer that is trained.
      sample_mb: text that it is trained on, in millions of bytes, from all over the
        training documents.
      selection: which documents are kept, in which split.
      shard_mb: text of a shard at most, in millions of bytes.
      num_workers: processes; 0: one for each core.
      on_fault: "skip": leave out and count what can't be read; "fail": stop there.
    """

    inputs: tuple[str, ...]
    output: Annotated[str, ANYWHERE]
    tokenizer: Annotated[str, ANYWHERE]
    vocab_size: Annotated[int, at_least(260)] = 32000
    sample_mb: Annotated[int, at_least(1)] = 256
    selection: Selection = dataclasses.field(default_factory=Selection)
    shard_mb: Annotated[int, at_least(1)] = 512
    num_workers: Annotated[int, at_least(0)] = 0
    on_fault: Literal["skip", "fail"] = "skip"
    validation_inputs: tuple[str, ...] = ()
    eos_token: str | None = None
    hub_config: str | None = None
    hub_split: str | None = None
    hub_validation_split: str | None = None

    def __post_init__(self):
        require(bool(self.inputs), "--input", ",".join(self.inputs), "files to prepare")
        for flag, paths in (("input", self.inputs), ("validation_input", self.validation_inputs)):
            for path in paths:
                if not is_hub(path):
                    check_local(f"--{flag}", path, buckets=True)
        for name, inputs in (
            ("hub_config", (*self.inputs, *self.validation_inputs)),
            ("hub_split", self.inputs),
            ("hub_validation_split", self.validation_inputs),
        ):
            if getattr(self, name) is not None and not any(map(is_hub, inputs)):
                flag = "--validation_input" if name == "hub_validation_split" else "--input"
                raise InputError(
                    f"--{name} is {getattr(self, name)!r}, but {flag} has no dataset of the"
                    " Hugging Face hub, hf://datasets/OWNER/NAME; leave it out."
                )
        check_settings(self, "--")
        require(bool(self.output), "--output", self.output, "the folder of the shards to be")
        require(
            bool(self.tokenizer),
            "--tokenizer",
            self.tokenizer,
            f"a tokenizer.json, a SentencePiece model, or '{TRAIN}'",
        )
        if self.eos_token is not None and self.tokenizer == TRAIN:
            raise InputError(
                f"--eos_token is {self.eos_token!r}, but --tokenizer=train learns one that ends"
                f" documents with {EOS}; leave --eos_token out."
            )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a preparation came to.

    Attributes:
      folder: of the shards.
      manifest: what it says.
      seconds: this run took for `bytes` and `tokens`.
      bytes, tokens: of text tokenised in this run; 0 if all pieces were done before.
      finished_before: the folder was finished already, and this run did nothing.
    """

    folder: Path
    manifest: Manifest
    seconds: float
    bytes: int
    tokens: int
    finished_before: bool = False


def prepare_shards(preparation: Preparation) -> Prepared:
    """Prepares a corpus, or goes on where a killed run left off.

    The files depend on the corpus and the settings alone, not on processes, faults of
    the machine or how often it was taken up again. A folder that is finished stays as
    it is. With more than one process, scripts must call it from under
    `if __name__ == "__main__":`, as all that start processes.

    Raises:
      InputError: if an input, the tokenizer or the output is unusable, another process
        is at work in the output, it holds something else, no document is left, or
        there is a fault and they are fatal.
    """
    target = None
    if buckets.is_bucket(preparation.output):
        target = buckets.bucket_path("--output", preparation.output)
        buckets.check_writable("--output", target)
        folder = copies.place("outputs", target)
    else:
        folder = local_path("--output", preparation.output)
    given = None
    if preparation.tokenizer != TRAIN:
        given = Tokenizer.load(preparation.tokenizer, preparation.eos_token)
    plan = make_plan(
        preparation.inputs,
        preparation.selection,
        preparation.shard_mb * 10**6,
        preparation.validation_inputs,
        HubOptions(
            preparation.hub_config,
            preparation.hub_split or "train",
            preparation.hub_validation_split or "validation",
        ),
    )
    identity = workspace.identity(_settings(preparation, given, plan), plan)
    if target is not None and (target / manifest.NAME).exists():
        content = workspace.require_finished(target, identity)
        return Prepared(target, content, 0.0, 0, 0, finished_before=True)
    if target is not None and not (folder / manifest.NAME).exists():
        workspace.require_empty(target)
    try:
        with workspace.locked(folder) as work:
            prepared = _prepare(preparation, folder, work, given, plan, identity)
            if target is not None:
                prepared = _publish(prepared, target)
            return prepared
    except OSError as error:
        raise InputError(
            f"--output is {preparation.output!r}, but nothing can be written there"
            f" ({error.strerror or error}); what is done is kept, and the same command goes on."
        ) from error


def _prepare(
    preparation: Preparation,
    folder: Path,
    work: Path,
    given: Tokenizer | None,
    plan: Plan,
    identity: workspace.Identity,
) -> Prepared:
    if (folder / manifest.NAME).exists():
        content = workspace.require_finished(folder, identity)
        shutil.rmtree(work)  # what a kill after the manifest left
        return Prepared(folder, content, 0.0, 0, 0, finished_before=True)
    workspace.claim(folder, work, identity)
    for path in plan.files:
        if path.error is not None and preparation.on_fault == "fail":
            raise InputError(
                f"{path.path} can't be read ({path.error}); --on_fault=skip leaves it out."
            )
    results = workspace.finished_units(work, plan)
    left = [unit for unit in plan.units if unit.index not in results]
    line = ProgressLine(
        total=sum(unit.weight for unit in plan.units),
        finished=sum(unit.weight for unit in plan.units if unit.index in results),
    )
    if results:
        pieces = quantity(len(plan.units), "piece was", "pieces were")
        line.line(f"prepare  goes on: {len(results):,} of {pieces} done before")
    for path in plan.files:
        if path.error is not None:
            line.line(f"skipped  {path.path}: can't be read ({path.error})")
    tokenizer, tokenizer_path = _tokenizer(preparation, given, plan, work, line)
    line = ProgressLine(line.total, line.finished)  # the clock starts now
    for result in process_all(
        left,
        work,
        tokenizer_path,
        preparation.selection,
        fatal=preparation.on_fault == "fail",
        num_workers=preparation.num_workers or _cores(),
        report=line.add,
    ):
        results[result.index] = result
        for text in _faults(result, plan):
            line.line(text)
    seconds = line.seconds
    line.close()
    ordered = [results[unit.index] for unit in plan.units]
    if not any("train" in result.shards for result in ordered):
        workspace.give_up(work)
        skipped = assemble.total_skipped(ordered)
        more = "".join(f"; {_HELP[reason]}" for reason in skipped if reason in _HELP)
        raise InputError(f"No training document is left; skipped: {skipped or 'none'}{more}.")
    splits = assemble.name_shards(ordered, work, folder, preparation.shard_mb * 10**6, tokenizer)
    tokenizer.save_in(folder)
    content = Manifest(
        created_by=f"lazyattn {__version__}",
        tokenizer=TokenizerRecord(
            kind=tokenizer.kind,
            file=tokenizer.file_name,
            sha256=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            beginning_of_document=tokenizer.bos_id,
            end_of_document=tokenizer.eos_id,
            padding=tokenizer.pad_id,
        ),
        token_dtype=token_dtype(tokenizer.vocab_size),
        splits=splits,
        sources=_sources(plan, ordered),
        settings=identity["settings"],
        skipped=assemble.total_skipped(ordered),
    )
    content.write(folder)
    shutil.rmtree(work)
    return Prepared(folder, content, seconds, line.done.bytes, line.done.tokens)


def _publish(prepared: Prepared, target: Path) -> Prepared:
    """Moves a finished folder into a bucket, its manifest last."""
    buckets.upload(prepared.folder, target, last=manifest.NAME)
    for file in prepared.folder.iterdir():
        buckets.remove(file)
    return dataclasses.replace(prepared, folder=target, finished_before=False)


def _cores() -> int:
    """Returns the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _settings(preparation: Preparation, given: Tokenizer | None, plan: Plan) -> dict[str, Any]:
    """Returns the settings that the shards depend on, as plain data."""
    tokenizer: dict[str, Any] = (
        {"vocab_size": preparation.vocab_size, "sample_mb": preparation.sample_mb}
        if given is None
        else {"sha256": given.fingerprint}
    )
    if given is not None and given.eos_token is not None:
        tokenizer["eos_token"] = given.eos_token
    settings = dataclasses.asdict(preparation.selection)
    settings |= {"shard_mb": preparation.shard_mb, "tokenizer": tokenizer}
    if preparation.validation_inputs:
        held_out = {unit.path for unit in plan.units if unit.goes_to == "validation"}
        held_out |= {text for unit in plan.units if unit.path in held_out for text in unit.texts}
        settings["validation_fraction"] = 0.0
        settings["validation_files"] = [f.file for f in plan.files if f.path in held_out]
    return settings


def _tokenizer(
    preparation: Preparation,
    given: Tokenizer | None,
    plan: Plan,
    work: Path,
    line: ProgressLine,
) -> tuple[Tokenizer, Path]:
    """Returns the tokenizer and its file in the work folder."""
    path = work / "tokenizer"
    if path.exists():
        return given or Tokenizer.load(path), path
    if given is None:
        line.line(f"prepare  trains a tokenizer of {preparation.vocab_size:,} entries")
        given = Tokenizer.train(_sample(preparation, plan), preparation.vocab_size)
    return given, given.save_in(work, path.name)


def _sample(preparation: Preparation, plan: Plan) -> Iterator[str]:
    """Yields training documents from the beginning of every unit."""
    quota = preparation.sample_mb * 10**6 / max(1, len(plan.units))
    for unit in plan.units:
        taken = 0
        try:
            for row in read_unit(unit, preparation.selection):
                if row.fault is not None:
                    continue
                chosen = select(row.text, row.id, row.score, preparation.selection, unit.goes_to)
                if isinstance(chosen, str) or chosen.split != "train":
                    continue
                yield chosen.text
                taken += chosen.size
                if taken >= quota:
                    break
        except DamagedFileError:
            continue  # reported when the unit is prepared


def _faults(result: UnitResult, plan: Plan) -> Iterator[str]:
    """Yields what to tell of a unit's faults."""
    unit = plan.units[result.index]
    if result.error is not None:
        yield f"skipped  {unit.path}: a part can't be read ({result.error})"
    yield from (f"skipped  {example}" for example in result.examples)
    one_by_one = (
        count for reason, count in result.skipped.items() if reason not in (LOW_SCORE, UNREADABLE)
    )
    more = sum(one_by_one) - len(result.examples)
    if more:
        yield f"skipped  {unit.path}: {quantity(more, 'more document')}"


def _sources(plan: Plan, results: Sequence[UnitResult]) -> tuple[SourceFile, ...]:
    found: dict[str, int] = {}
    errors: dict[str, str] = {}
    for unit, result in zip(plan.units, results, strict=True):
        for path in unit.texts:
            found[path] = 1
        if not unit.texts:
            found[unit.path] = found.get(unit.path, 0) + result.found
        if result.error is not None:
            errors.setdefault(unit.path, result.error)
    return tuple(
        SourceFile(
            file=file.file,
            size=file.size,
            modified=file.modified,
            documents=found.get(file.path, 0),
            error=file.error or errors.get(file.path),
        )
        for file in plan.files
    )
