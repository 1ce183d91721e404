"""LAMBADA: is the last word of a passage the one the model expects?"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lazyattn.data.copies import here
from lazyattn.data.text_files import json_lines
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError, bad_value, require
from lazyattn.eval.scoring import Scorer


class Passage(NamedTuple):
    """A passage as tokens.

    Attributes:
      tokens: the beginning-of-sequence token, the context and the last word.
      word: how many of the last tokens are that word, the space before it included.
    """

    tokens: list[int]
    word: int


class LambadaResult(NamedTuple):
    """What came out.

    Attributes:
      perplexity: exp of the mean negative log-likelihood of a last word, which may be
        several tokens.
      accuracy: share of passages whose last word is what greedy decoding gives.
      passages: number of passages.
    """

    perplexity: float
    accuracy: float
    passages: int


def read_lambada(path: str) -> list[str]:
    """Returns the passages of a `.jsonl` file with a field `text`.

    Raises:
      InputError: if there is no such file, it has another form or holds no passage
        of two words.
    """
    file = here("--lambada", path)
    if not file.is_file() or file.suffix != ".jsonl":
        raise bad_value("--lambada", path, 'a .jsonl file with a passage a line, {"text": ...}')
    passages = [text.strip() for _, text in json_lines(file, "--lambada", ("text",))]
    if not passages:
        raise InputError(f"--lambada is {path!r}, but there is no passage in it.")
    for passage in passages:
        if " " not in passage:
            raise InputError(
                f"--lambada is {path!r}, but a passage in it is {passage!r}, which has no last"
                " word after a space."
            )
    return passages


def tokenize_passages(passages: Sequence[str], tokenizer: Tokenizer) -> list[Passage]:
    """Returns passages as tokens; context and last word meet as they do in whole text.

    Raises:
      InputError: naming the first passage whose last word adds no token to its context:
        there is nothing to score. A tokenizer that merges across spaces can do that.
    """
    contexts = tokenizer.encode_batch([passage.rsplit(" ", 1)[0] for passage in passages])
    found = [
        Passage([tokenizer.bos_id, *whole], len(whole) - len(context))
        for context, whole in zip(contexts, tokenizer.encode_batch(passages), strict=True)
    ]
    for number, (text, passage) in enumerate(zip(passages, found, strict=True), 1):
        if passage.word < 1:
            raise InputError(
                f"Passage {number} of --lambada ends in {text[-40:]!r}, whose last word the"
                " tokenizer merges into what comes before it, so there is nothing to score."
            )
    return found


def check_words(passages: Sequence[Passage], context: int) -> None:
    """Checks that every last word can be scored with some context.

    Raises:
      InputError: if one has no token, or more than the context.
    """
    longest = max(passage.word for passage in passages)
    require(
        longest <= context, "the context", context, f"at least {longest}, the longest last word"
    )
    shortest = min(passage.word for passage in passages)
    require(shortest >= 1, "the tokens of a passage's last word", shortest, "at least 1")


def score_lambada(scorer: Scorer, passages: Sequence[Passage], context: int) -> LambadaResult:
    """Returns perplexity and accuracy.

    Args:
      scorer: the model.
      passages: those of a passage's tokens that the context has no room for are
        left out, the first of them first.
      context: tokens a prediction may look at.

    Raises:
      InputError: as `check_words`.
    """
    check_words(passages, context)
    rows = [passage.tokens[-(context + 1) :] for passage in passages]
    scores = scorer(rows, context=context, label=f"LAMBADA, context {context}")
    words = list(zip(scores, (passage.word for passage in passages), strict=True))
    nll = [float(score.nll[-word:].sum(dtype=np.float64)) for score, word in words]
    right = [bool(score.greedy[-word:].all()) for score, word in words]
    mean = sum(nll) / len(nll)
    return LambadaResult(
        math.exp(mean) if mean < 700 else math.inf, sum(right) / len(right), len(right)
    )
