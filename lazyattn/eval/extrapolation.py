"""Perplexity at several context lengths: table, picture and data."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lazyattn.data.documents import Corpus
from lazyattn.errors import require
from lazyattn.eval.lambada import Passage, check_words, score_lambada
from lazyattn.eval.scoring import Scorer
from lazyattn.eval.windows import rolling_windows


@dataclasses.dataclass(frozen=True)
class TextResult:
    """How well a model predicts a corpus with some context.

    Attributes:
      corpus: its name.
      context: tokens a prediction may look at.
      stride: tokens predicted by a window after the first.
      loss: nats a token.
      perplexity: exp(loss).
      word_perplexity: exp(all nats / words).
      byte_perplexity: exp(all nats / bytes).
      bits_per_byte: all bits / bytes.
      documents, tokens, words, bytes: what was measured on.
    """

    corpus: str
    context: int
    stride: int
    loss: float
    perplexity: float
    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float
    documents: int
    tokens: int
    words: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class LambadaLine:
    """LAMBADA with some context; fields as in `LambadaResult`."""

    context: int
    perplexity: float
    accuracy: float
    passages: int


def score_corpus(scorer: Scorer, corpus: Corpus, context: int, stride: int) -> TextResult:
    """Returns the perplexity of a corpus over rolling windows.

    Args:
      scorer: the model.
      corpus: every document is predicted by itself; its first token, the
        beginning-of-sequence token, is not.
      context: tokens a prediction may look at.
      stride: as in `rolling_windows`.

    Raises:
      InputError: for an empty document or a stride out of range.
    """
    require(bool(corpus.documents), "the number of documents", 0, "at least 1")
    rows, skipped = [], []
    for document in corpus.documents:
        for window in rolling_windows(document.size, context, stride):
            rows.append(document[window.start : window.stop])
            skipped.append(window.first - window.start - 1)
    scores = scorer(rows, context=context, label=f"{corpus.name}, context {context}")
    nll = sum(
        float(score.nll[skip:].sum(dtype=np.float64))
        for score, skip in zip(scores, skipped, strict=True)
    )
    tokens = sum(document.size - 1 for document in corpus.documents)
    return TextResult(
        corpus=corpus.name,
        context=context,
        stride=stride,
        loss=nll / tokens,
        perplexity=_exp(nll / tokens),
        word_perplexity=_exp(nll / corpus.words),
        byte_perplexity=_exp(nll / corpus.bytes),
        bits_per_byte=nll / math.log(2) / corpus.bytes,
        documents=len(corpus.documents),
        tokens=tokens,
        words=corpus.words,
        bytes=corpus.bytes,
    )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def check(passages: Sequence[Passage], contexts: Sequence[int], stride: int | None) -> None:
    """Checks what `extrapolate` is asked for.

    Raises:
      InputError: for a stride or a last word that is longer than a context.
    """
    shortest = min(contexts)
    require(
        stride is None or 1 <= stride <= shortest,
        "--stride",
        stride,
        f"from 1 to the shortest context, {shortest}",
    )
    if passages:
        check_words(passages, shortest)


def extrapolate(
    scorer: Scorer,
    corpora: Sequence[Corpus],
    passages: Sequence[Passage],
    contexts: Sequence[int],
    stride: int | None,
) -> tuple[list[TextResult], list[LambadaLine]]:
    """Returns the results at every context, shortest first.

    Args:
      scorer: the model.
      corpora: texts to predict.
      passages: of LAMBADA; none: leave it out.
      contexts: tokens a prediction may look at.
      stride: as in `rolling_windows`; None: the context, for each.

    Raises:
      InputError: as `check`, before anything is scored.
    """
    check(passages, contexts, stride)
    contexts = sorted(set(contexts))
    texts = [
        score_corpus(scorer, corpus, context, stride or context)
        for corpus in corpora
        for context in contexts
    ]
    lines = [
        LambadaLine(context, *score_lambada(scorer, passages, context))
        for context in contexts
        if passages
    ]
    return texts, lines


def as_table(texts: Sequence[TextResult], lambada: Sequence[LambadaLine], trained: int) -> str:
    """Returns the results as Markdown; contexts longer than the training's have a *.

    Args:
      texts, lambada: the results.
      trained: tokens of a row in training.
    """

    def length(context: int) -> str:
        return f"{context}{' *' if context > trained else ''}"

    parts = []
    if texts:
        lines = [
            "| text | context | stride | nats a token | perplexity | by word | bits per byte |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r.corpus} | {length(r.context)} | {r.stride} | {r.loss:.4f} | {r.perplexity:.2f}"
            f" | {r.word_perplexity:.2f} | {r.bits_per_byte:.4f} |"
            for r in texts
        ]
        parts.append("\n".join(lines))
    if lambada:
        lines = ["| LAMBADA, context | perplexity | accuracy |", "|---|---|---|"]
        lines += [
            f"| {length(r.context)} | {r.perplexity:.2f} | {r.accuracy:.4f} |" for r in lambada
        ]
        parts.append("\n".join(lines))
    contexts = [r.context for r in texts] + [r.context for r in lambada]
    if any(context > trained for context in contexts):
        parts.append(f"\\* longer than the rows of {trained} tokens the model was trained on")
    return "\n\n".join(parts)


def as_data(
    texts: Sequence[TextResult], lambada: Sequence[LambadaLine], trained: int
) -> dict[str, Any]:
    """Returns the results as plain data; arguments as in `as_table`."""
    return {
        "trained_context": trained,
        "texts": [dataclasses.asdict(result) for result in texts],
        "lambada": [dataclasses.asdict(result) for result in lambada],
    }


def draw(
    texts: Sequence[TextResult], lambada: Sequence[LambadaLine], trained: int, path: Path
) -> bool:
    """Draws perplexity over context length, a panel a text; arguments as in `as_table`.

    Returns:
      Whether it did: matplotlib is not among what the package needs.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    curves: dict[str, list[tuple[int, float]]] = {}
    for result in texts:
        curves.setdefault(result.corpus, []).append((result.context, result.perplexity))
    for line in lambada:
        curves.setdefault("LAMBADA, last word", []).append((line.context, line.perplexity))
    # A panel each: a text's perplexity says nothing beside another's.
    figure = Figure(figsize=(0.6 + 3.2 * len(curves), 3), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (label, points) in zip(panels, curves.items(), strict=True):
        contexts = [context for context, _ in points]
        axes.plot(contexts, [perplexity for _, perplexity in points], "o-", ms=4)
        axes.axvline(trained, color="grey", lw=1, ls=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [str(context) for context in contexts], rotation=45)
        axes.minorticks_off()
        axes.set_title(label, fontsize=10)
        axes.set_xlabel(f"context (dotted: trained at {trained})")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("perplexity")
    figure.savefig(path, dpi=110)
    return True
