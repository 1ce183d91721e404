"""What perplexity is measured on: documents of a file, a folder or a run's own data."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from lazyattn import buckets
from lazyattn.data import manifest, sources
from lazyattn.data.config import DataConfig
from lazyattn.data.copies import here
from lazyattn.data.corpus import is_validation
from lazyattn.data.shards import Shards
from lazyattn.data.text_files import json_lines, read_text
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError, bad_value
from lazyattn.paths import folder

# The name of a run's own held-out documents.
VALIDATION = "validation"


@dataclasses.dataclass(frozen=True)
class Text:
    """A document as it is read, and what perplexity is to be divided by.

    Attributes:
      text: what the model sees.
      words: words it stands for.
      bytes: bytes of UTF-8 it stands for.
    """

    text: str
    words: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to measure perplexity on.

    Attributes:
      name: for tables.
      documents: token ids of each, the beginning-of-sequence token first. There is
        no end-of-sequence token: it stands for no bytes.
      words: words of all documents.
      bytes: bytes of all documents.
    """

    name: str
    documents: list[Int32[np.ndarray, " tokens"]]
    words: int
    bytes: int


def read_texts(path: str) -> list[Text]:
    """Returns the documents of a file or a folder, in order; blank ones are left out.

    Args:
      path: a `.txt` file (one document), a folder of them, or a `.jsonl` file whose
        lines have a field `text`, or `page`: an article in WikiText's raw
        tokenisation. A page is turned back into ordinary text, while its words and
        bytes are counted as they stood; so does lm-evaluation-harness.

    Raises:
      InputError: if there is no such file, it has another form, is no UTF-8 or other
        Unicode, or holds no text.
    """
    file = here("--text", path)
    if file.is_dir():
        return [_plain(document.text) for document in sources.documents(str(file), "--text")]
    if not file.is_file() or file.suffix not in (".txt", ".jsonl"):
        raise bad_value(
            "--text", path, "a .txt or .jsonl file, or a folder of .txt files or shards"
        )
    if file.suffix == ".txt":
        texts = [_plain(read_text(file, "--text"))]
    else:
        texts = [
            _page(text) if field == "page" else _plain(text)
            for field, text in json_lines(file, "--text", ("page", "text"))
        ]
    texts = [text for text in texts if text.text.strip()]
    if not texts:
        raise InputError(f"--text is {path!r}, but there is no text in it.")
    return texts


def validation_texts(config: DataConfig) -> list[Text]:
    """Returns the held-out documents of a run's own source.

    Raises:
      InputError: if the source is missing or has none.
    """
    texts = [
        _plain(document.text)
        for document in sources.documents(config.source)
        if is_validation(document.id, config.validation_fraction)
    ]
    if not texts:
        raise InputError(f"data.source {config.source!r} has no validation document.")
    return texts


def is_prepared(path: str) -> bool:
    """Returns whether a folder holds tokenised shards."""
    buckets.check_readable("--text", path)
    return (folder("--text", path) / manifest.NAME).is_file()


def read_prepared(
    name: str, folders: Sequence[str], tokenizer: Tokenizer, limit: int | None = None
) -> Corpus:
    """Returns the validation documents of folders of tokenised shards.

    Args:
      name: for tables.
      folders: of shards, made with `tokenizer`.
      tokenizer: the model's.
      limit: documents to take of each folder; None: all.

    Raises:
      InputError: if a folder can't be read, has another tokenizer or no validation
        document.
    """
    documents = []
    words = size = 0
    for named in folders:
        own = here("--text", named, without="train-*")
        content = manifest.read(own)
        if content.tokenizer.sha256 != tokenizer.fingerprint:
            raise InputError(
                f"{named!r} was prepared with another tokenizer than the run was trained with;"
                " prepare it with the run's own."
            )
        shards = Shards(own, "validation", content)
        for index in range(len(shards) if limit is None else min(limit, len(shards))):
            ids = shards[index].astype(np.int32)
            if ids.size:
                documents.append(np.concatenate([[tokenizer.bos_id], ids]).astype(np.int32))
                words += len(tokenizer.decode(ids.tolist()).split())
                size += int(tokenizer.bytes_per_token[ids].sum())
    if not documents:
        raise InputError(f"{', '.join(folders)} has no validation document with text.")
    return Corpus(name, documents, words, size)


def tokenize(name: str, texts: Sequence[Text], tokenizer: Tokenizer) -> Corpus:
    """Returns the documents as a model reads them.

    One of which the tokenizer leaves nothing, such as a lone zero-width space that it
    takes away, is left out as blank ones are.

    Raises:
      InputError: if no document is left.
    """
    ids = tokenizer.encode_batch([text.text for text in texts])
    kept = [(text, one) for text, one in zip(texts, ids, strict=True) if one]
    if not kept:
        raise InputError(f"The text {name!r} has no document of which the tokenizer keeps a token.")
    return Corpus(
        name,
        [np.asarray([tokenizer.bos_id, *one], np.int32) for _, one in kept],
        sum(text.words for text, _ in kept),
        sum(text.bytes for text, _ in kept),
    )


def _plain(text: str) -> Text:
    return Text(text, len(text.split()), len(text.encode()))


def _page(page: str) -> Text:
    # White space at either end makes an empty word, there as well.
    return Text(wikitext_to_plain(page), len(re.split(r"\s+", page)), len(page.encode()))


# WikiText's title marks, longest first, so that none is taken for a part of another.
_TITLES = ("= = = =", "= = =", "= =")
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))


def wikitext_to_plain(page: str) -> str:
    """Returns a WikiText page without its tokenisation: "1 @,@ 000 ( x )" is "1,000 (x)".

    The rules, and their order, are those that the `wikitext` task of
    lm-evaluation-harness goes by, so that both score the same text.
    """
    page = page.replace("s '", "s'")
    for mark in "-,.":
        page = page.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        page = page.replace(f" {mark} ", f"{mark} ")
    for left, right in _PAIRS:
        inside = rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"
        page = re.sub(inside, rf"{left}\1{right}", page)
    for title in _TITLES:
        page = page.replace(title, title.replace(" ", ""))
    page = page.replace(" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}")
    page = page.replace(" \n", "\n").replace("\n ", "\n")
    return page.replace(" N ", " 1 ").replace(" 's", "'s")
