"""`--mode=inspect`: a report on the attention of one run's checkpoint, or of two."""

import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int32

from lazyattn import buckets
from lazyattn.checkpoint.load import TrainedModel, load_trained
from lazyattn.checkpoint.workdir import check_tokenizer
from lazyattn.data.config import DataConfig
from lazyattn.data.decoding import Continuation
from lazyattn.data.documents import (
    VALIDATION,
    is_prepared,
    read_prepared,
    read_texts,
    tokenize,
    validation_texts,
)
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import require
from lazyattn.experiment import ExperimentConfig
from lazyattn.generation.cache import check_context, trained_cache_length
from lazyattn.inspect.cache import cache_table
from lazyattn.inspect.figures import Inspected, model_data, summary_table
from lazyattn.inspect.flags import InspectionOptions
from lazyattn.inspect.measure import measure
from lazyattn.inspect.report import write_report
from lazyattn.inspect.sequences import LENGTH, cut, inserted_token, sink_metric
from lazyattn.paths import results
from lazyattn.quantity import quantity

_FOLDER = "inspection"
# Documents read, at most: more than any report needs.
_DOCUMENTS = 2000
# Sequences that the fixed token is put into, once a place.
_INSERTED = 32

_Documents = list[Int32[np.ndarray, " tokens"]]


def inspect(
    path: str | os.PathLike[str],
    experiment: ExperimentConfig | None = None,
    options: InspectionOptions | None = None,
    step: int | str | None = None,
) -> Path:
    """Looks inside and writes the report.

    Args:
      path: the run's folder, or an export's.
      experiment: settings of that run to use; None: the checkpoint's own.
      options: what to look at.
      step: which checkpoint of each run, as `load_trained` has it.

    Returns:
      The report's folder, which has `report.html` and `report.json`.

    Raises:
      InputError: if there is no checkpoint or tokenizer, the text has too little in it,
        or something asked for is wrong, all before anything is compiled.
    """
    options = InspectionOptions() if options is None else options
    text = None if options.text in (None, VALIDATION) else options.text
    if text is not None and not is_prepared(text):
        read_texts(text)  # what is wrong with it comes out before checkpoints are read
    folder = results(options.output, path, _FOLDER)
    check_tokenizer(path)
    if options.against is not None:
        check_tokenizer(options.against, "--against")
    runs = {str(path): load_trained(path, experiment, step)}
    if options.against is not None:
        runs[str(options.against)] = load_trained(options.against, step=step, flag="--against")
    models = list(runs.values())
    if text is None:
        models[0].require_data("--text")
    name = text or "the run's validation text"
    documents = [_read(text, models[0].experiment.data, model.tokenizer) for model in models]
    length = row_length(models, documents, options, name)
    heads = _heads(options, models[0])

    data = []
    for label, model, own in zip(_labels(list(runs)), models, documents, strict=True):
        print(f"{label}: checkpoint {model.checkpoint}, {length} tokens a row", flush=True)
        found = _look(model, own, length, options.rows)
        data.append(model_data(label, model, found, heads))
        heads = heads or tuple((m["layer"], m["head"]) for m in data[0]["maps"])
    with buckets.written(folder) as work:
        write_report(work, {"text": name, "models": data})
    print(f"\n{summary_table(data)}\n\n{cache_table(data)}\n")
    print(f"Written to {folder}: report.html, report.json.")
    return folder


def _read(text: str | None, data: DataConfig, tokenizer: Tokenizer) -> _Documents:
    """Returns the documents of a text, or the validation documents of `data`."""
    if text is not None and is_prepared(text):
        return read_prepared(text, [text], tokenizer, _DOCUMENTS).documents
    if text is None and data.tokenised:
        folders = [path for path, _ in data.weighted_paths]
        return read_prepared(data.name, folders, tokenizer, _DOCUMENTS).documents
    texts = validation_texts(data) if text is None else read_texts(text)
    return tokenize("", texts[:_DOCUMENTS], tokenizer).documents


def row_length(
    models: Sequence[TrainedModel],
    documents: Sequence[_Documents],
    options: InspectionOptions,
    name: str,
) -> int:
    """Returns how many tokens a row has, the same for all models.

    Raises:
      InputError: if a model can't take so many, or the text has too few.
    """
    longest = min(max(map(len, own)) for own in documents)
    # The beginning-of-document token is not the text's.
    require(
        longest > LENGTH,
        "the longest document of --text",
        f"{longest - 1} tokens long",
        f"at least {LENGTH} tokens long ({name})",
    )
    trained = min(model.experiment.data.sequence_length for model in models)
    length = min(trained, longest) if options.length is None else options.length
    require(
        length <= longest,
        "--length",
        length,
        f"at most {longest}, the tokens of the longest document of {name}",
    )
    for model in models:
        config, sequence_length = model.experiment.model, model.experiment.data.sequence_length
        check_context(
            length,
            config,
            sequence_length,
            name="--length",
            beyond_table=options.beyond_table,
        )
        only = trained_cache_length(config, sequence_length)
        require(
            only is None or length <= only,
            "--length",
            length,
            f"at most {only}, the length of rows that lazy_length_offset was trained on",
        )
    return length


def cut_rows(documents: _Documents, length: int, rows: int, bos: int) -> _Documents:
    """Returns up to `rows` rows of `length` tokens, each of one document.

    A document that fills several begins again with the beginning-of-document token in
    each, so that first tokens are alike.
    """
    found: _Documents = []
    for document in documents:
        rest = document[1:]
        for start in range(0, len(rest) - (length - 1) + 1, length - 1):
            part = rest[start : start + length - 1]
            found.append(np.concatenate([[bos], part]).astype(np.int32))
            if len(found) == rows:
                return found
    return found


def _look(model: TrainedModel, documents: _Documents, length: int, rows: int) -> Inspected:
    config, bos = model.experiment.model, model.tokenizer.bos_id
    only = trained_cache_length(config, model.experiment.data.sequence_length)
    taken = cut_rows(documents, length, rows, bos)
    sequences = cut([document[1:] for document in documents])
    with jax.set_mesh(model.mesh):
        measured = measure(
            model.params,
            config,
            taken,
            length=only,
            done=lambda row: print(f"  row {row + 1} of {len(taken)}", flush=True),
        )
        sink = sink_metric(model.params, config, sequences, length=only)
        inserted = inserted_token(model.params, config, sequences[:_INSERTED], bos, length=only)
    print(f"  {quantity(len(sequences), 'sequence')} of {LENGTH} tokens", flush=True)
    tokens = _shown(model.tokenizer, taken[0])
    return Inspected(measured, sink, inserted, len(taken), length, tokens)


def _shown(tokenizer: Tokenizer, tokens: Int32[np.ndarray, " length"]) -> list[str]:
    """Returns what each token adds to the text of those before it."""
    names = {tokenizer.bos_id: "beginning of document", tokenizer.eos_id: "end of document"}
    ids = tokens.tolist()
    return [
        names.get(token) or Continuation(tokenizer, ids[max(0, place - 8) : place]).text([token])
        for place, token in enumerate(ids)
    ]


def _heads(options: InspectionOptions, model: TrainedModel) -> tuple[tuple[int, int], ...]:
    config = model.experiment.model
    for layer, head in options.heads:
        require(
            layer < config.num_layers and head < config.attention.num_heads,
            "--heads",
            f"{layer}.{head}",
            f"at most {config.num_layers - 1}.{config.attention.num_heads - 1}",
        )
    return options.heads


def _labels(paths: Sequence[str]) -> list[str]:
    names = [Path(path).expanduser().absolute().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
