"""FineWeb-Edu as a TensorFlow dataset, built and read without TensorFlow.

    from lazyattn.data.fineweb_edu import build
    build("path/to/datasets", source="path/to/parquet")

writes ArrayRecord files. `tfds.data_source("fineweb_edu/local", data_dir=...)` reads
them, and `python -m lazyattn.data.prepare --input=path/to/datasets/fineweb_edu/local/1.0.0`
tokenises them. Needs the packages tensorflow-datasets and importlib_resources.
"""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from lazyattn.data.parquet import DamagedFileError, open_parquet, parquet_rows
from lazyattn.data.prepare.selection import LOW_SCORE, UNREADABLE, Selection, select
from lazyattn.errors import InputError, bad_value, require
from lazyattn.paths import check_local, local_path

try:
    import tensorflow_datasets as tfds
except ImportError as error:
    raise InputError(
        "FineWeb-Edu as a TensorFlow dataset needs the packages tensorflow-datasets and"
        f" importlib_resources ({error}); `pip install tensorflow-datasets importlib_resources`"
        " adds them."
    ) from error

_REPOSITORY = "HuggingFaceFW/fineweb-edu"  # on the Hugging Face hub

_TEXTS = ("text", "id", "dump", "url", "file_path", "language")
_FLOATS = ("language_score", "score")
_INTEGERS = ("token_count", "int_score")
FIELDS = (*_TEXTS, *_FLOATS, *_INTEGERS)

# What is written where a document has nothing.
_NOTHING: dict[str, Any] = {
    **dict.fromkeys(_TEXTS, ""),
    **dict.fromkeys(_FLOATS, math.nan),
    **dict.fromkeys(_INTEGERS, -1),
}


@dataclasses.dataclass(eq=False)
class FinewebEduConfig(tfds.core.BuilderConfig):
    """A part of FineWeb-Edu.

    Attributes:
      pattern: its files on the hub; None: there are none, a folder is needed.
    """

    pattern: str | None = None


class FinewebEdu(tfds.core.GeneratorBasedBuilder):
    """The builder; `fineweb_edu` to TFDS.

    Documents keep their order. Where they are split is where
    `python -m lazyattn.data.prepare` splits them.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
        FinewebEduConfig(
            name="sample_10bt",
            description="About 10 billion tokens, chosen at random.",
            pattern="sample/10BT/*.parquet",
        ),
        FinewebEduConfig(
            name="sample_100bt",
            description="About 100 billion tokens, chosen at random.",
            pattern="sample/100BT/*.parquet",
        ),
        FinewebEduConfig(name="local", description="A folder of Parquet files."),
    ]

    def __init__(
        self,
        *,
        source: str | os.PathLike[str] | None = None,
        min_int_score: int | None = None,
        validation_fraction: float = 0.005,
        on_fault: str = "skip",
        **kwargs: Any,
    ):
        """Opens the dataset if it is built.

        Args:
          source: folder of Parquet files in FineWeb-Edu's schema, read instead of the
            hub's.
          min_int_score: lowest score that is kept; None: all are.
          validation_fraction: share held out, by the hash of the id.
          on_fault: of damaged files and documents: "skip" reports and leaves them out,
            "fail" ends it all.
          kwargs: those of every builder: `config`, `data_dir` and so on.

        Raises:
          InputError: if a setting is bad.
        """
        if source is not None:
            check_local("source", source)
        self._source = source
        self._selection = Selection(
            min_int_score=min_int_score, validation_fraction=validation_fraction
        )
        require(on_fault in ("skip", "fail"), "on_fault", on_fault, "'skip' or 'fail'")
        self._fatal = on_fault == "fail"
        kwargs.setdefault("file_format", "array_record")
        super().__init__(**kwargs)

    @property
    def settings(self) -> dict[str, Any]:
        """What the documents depend on besides their source; kept with the dataset."""
        return {
            "min_int_score": self._selection.min_int_score,
            "validation_fraction": self._selection.validation_fraction,
        }

    def _info(self) -> tfds.core.DatasetInfo:
        kinds = {
            **dict.fromkeys(_TEXTS, tfds.features.Text()),
            **dict.fromkeys(_FLOATS, np.float32),  # a tf.train.Example holds no wider ones
            **dict.fromkeys(_INTEGERS, np.int64),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({field: kinds[field] for field in FIELDS}),
            homepage=f"https://huggingface.co/datasets/{_REPOSITORY}",
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        files = self._files()
        self.info.metadata.update(self.settings)
        return {split: self._generate_examples(files, split) for split in ("train", "validation")}

    def _generate_examples(self, files: list[Path], split: str) -> Iterator[tuple[int, dict]]:
        """Yields the documents of a split, numbered; faults are told with the first one."""
        number = 0
        skipped: Counter[str] = Counter()
        tell = split == "train"
        for file in files:
            try:
                for place, document in _documents(file):
                    chosen = select(
                        document["text"], document["id"], document["int_score"], self._selection
                    )
                    if isinstance(chosen, str):
                        skipped[chosen] += 1
                        if chosen != LOW_SCORE and tell:
                            self._fault(f"{file}, row {place:,}: {chosen}")
                    elif chosen.split == split:
                        found = {k: v for k, v in document.items() if v is not None}
                        yield number, {**_NOTHING, **found, "text": chosen.text}
                        number += 1
            except DamagedFileError as damaged:
                skipped[UNREADABLE] += damaged.lost or 0
                if tell:
                    self._fault(f"{file}: a part can't be read ({damaged})")
        self.info.metadata["skipped"] = dict(sorted(skipped.items()))

    def _files(self) -> list[Path]:
        folder, pattern = self._source, self.builder_config.pattern
        if folder is None and pattern is None:
            raise bad_value("source", None, "a folder of Parquet files in FineWeb-Edu's schema")
        if folder is None:
            folder = _download(pattern)
        files = sorted(Path(folder).expanduser().rglob("*.parquet"))
        if not files:
            raise bad_value("source", os.fspath(folder), "a folder that holds Parquet files")
        return files

    def _fault(self, what: str) -> None:
        if self._fatal:
            raise InputError(f"{what}; on_fault='skip' leaves such documents out and counts them.")
        logging.warning("skipped  %s", what)


def build(
    data_dir: str | os.PathLike[str], config: str = "local", **settings: Any
) -> tfds.core.DatasetBuilder:
    """Builds FineWeb-Edu, or finds it built.

    Args:
      data_dir: folder of datasets; this one goes to `fineweb_edu/CONFIG/VERSION` there.
      config: "sample_10bt", "sample_100bt" or "local".
      settings: `source`, `min_int_score`, `validation_fraction` and `on_fault` of
        `FinewebEdu`. Without `source` the samples are downloaded.

    Returns:
      The builder; `as_data_source("train")` of it reads the documents.

    Raises:
      InputError: if a setting is bad, there are no files, a fault is fatal, or it has
        been built with other settings.
    """
    known = [each.name for each in FinewebEdu.BUILDER_CONFIGS]
    require(config in known, "config", config, f"one of {', '.join(known)}")
    builder = FinewebEdu(config=config, data_dir=local_path("data_dir", data_dir), **settings)
    if builder.is_prepared():
        for name, value in builder.settings.items():
            found = (builder.info.metadata or {}).get(name)
            if found != value:
                raise InputError(
                    f"{str(builder.data_path)!r} was built with {name} = {found!r} and not"
                    f" {value!r}; give another data_dir or delete that folder."
                )
    try:
        builder.download_and_prepare()
    except AssertionError as error:  # so TFDS says that a split is empty
        raise InputError(
            f"fineweb_edu can't be built: a split has no document ({error}); give more documents or"
            " another validation_fraction."
        ) from error
    return builder


def open_dataset(folder: str | os.PathLike[str]) -> tfds.core.DatasetBuilder:
    """Opens the folder of a built dataset, this one or another with the same fields.

    Raises:
      InputError: if there is none.
    """
    try:
        return tfds.builder_from_directory(os.fspath(folder))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(
            f"{os.fspath(folder)!r} is no folder of a built TensorFlow dataset ({error})."
        ) from error


def shard_documents(path: str | os.PathLike[str]) -> tuple[str, int, int]:
    """Returns the split that a dataset's ArrayRecord file is of, and where in it.

    Returns:
      The split's name, its first document in the file, and one more than the last.

    Raises:
      InputError: if the dataset doesn't know the file.
    """
    dataset = open_dataset(Path(path).parent)
    for name, split in dataset.info.splits.items():
        begin = 0
        for file, length in zip(split.filepaths, split.shard_lengths, strict=True):
            if file.name == Path(path).name:
                return name, begin, begin + length
            begin += length
    raise InputError(f"{os.fspath(path)!r} is no file of the dataset in its folder.")


def _download(pattern: str) -> str:
    """Fetches the files of a sample into the hub's cache, what is there already not again."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            "To download FineWeb-Edu the package huggingface_hub is needed; install it, or give"
            " the folder of downloaded Parquet files as source."
        ) from error
    return huggingface_hub.snapshot_download(
        _REPOSITORY, repo_type="dataset", allow_patterns=[pattern]
    )


def _documents(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields row numbers and documents of a file; text as bytes.

    Raises:
      DamagedFileError: at the end, if it is damaged.
      InputError: if it lacks a column.
    """
    parquet = open_parquet(str(file))
    missing = [field for field in FIELDS if field not in parquet.schema_arrow.names]
    if missing:
        raise InputError(f"{file} is not in FineWeb-Edu's schema: it has no {missing[0]}.")
    for place, values in parquet_rows(parquet, FIELDS, 0, parquet.metadata.num_rows):
        yield place, dict(zip(FIELDS, values, strict=True))
