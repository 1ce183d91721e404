"""How far back a model reaches: copying, pass keys and loss by position, as tables and data."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int32

from lazyattn.data.documents import Corpus
from lazyattn.errors import bad_value
from lazyattn.eval import retrieval
from lazyattn.eval.by_position import by_position, document_rows, position_edges
from lazyattn.eval.estimates import Estimate, estimate
from lazyattn.eval.retrieval import Copied, Encoder, PassKeys, Score


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
      distances: from what is repeated back to where it stood; none: `default_distances`.
      span: tokens copied.
      rows: rows of each figure.
      seed: of the places and keys drawn.
    """

    distances: tuple[int, ...] = ()
    span: int = retrieval.SPAN
    rows: int = retrieval.ROWS
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Reach:
    """How far back a model reaches in rows of one length.

    Attributes:
      corpus: name of the text.
      context: predictions of a row.
      copy: distance -> nats a copied token; None: nothing to copy from.
      pass_keys: distance -> how well keys are repeated, for the distances that fit.
      position: (first, after the last) -> nats a token.
      whole: nats a token over all positions of the same rows.
    """

    corpus: str
    context: int
    copy: dict[int | None, Copied]
    pass_keys: dict[int, PassKeys]
    position: dict[tuple[int, int], Estimate]
    whole: Estimate


def check_plan(plan: Plan, contexts: Sequence[int]) -> None:
    """Checks that rows have room for what is to be measured.

    Args:
      plan: what to measure.
      contexts: predictions of a row; a distance has to fit into the longest.

    Raises:
      InputError: naming the flag, if a context has no room for two spans or no context for a
        distance.
    """
    # A row begins with the beginning-of-document token.
    shortest, longest = min(contexts), max(contexts)
    if retrieval.farthest_copy(shortest, plan.span, bos=0) < plan.span:
        raise bad_value(
            "--retrieval_span",
            plan.span,
            f"at most {shortest // 2}, half of the context {shortest}",
        )
    farthest = retrieval.farthest_copy(longest, plan.span, bos=0)
    for distance in plan.distances:
        if not plan.span <= distance <= farthest:
            raise bad_value(
                "--retrieval_distances",
                distance,
                f"from {plan.span} (--retrieval_span) to {farthest}, what rows of {longest} have"
                " room for",
            )


def check_corpus(corpus: Corpus, plan: Plan, contexts: Sequence[int]) -> None:
    """Checks that a text is long enough; raises InputError if not."""
    retrieval.check_stream(_stream(corpus), max(contexts), plan.span)


def measure(
    score: Callable[..., tuple[np.ndarray, np.ndarray]],
    corpus: Corpus,
    context: int,
    plan: Plan,
    tokenizer: Encoder,
    bos: int,
) -> Reach:
    """Returns how far back a model reaches.

    Everything is scored in rows of one length, so that one program is compiled.

    Args:
      score: the model: tokens and `label=` to `retrieval.Score`'s result.
      corpus: text that rows are made of.
      context: predictions of a row.
      plan: what to measure.
      tokenizer: the model's.
      bos: the beginning-of-document token.

    Raises:
      InputError: as `check_plan` and `check_corpus`.
    """
    stream = _stream(corpus)
    shared: dict[str, Any] = {"rows": plan.rows, "seed": plan.seed, "bos": bos}
    farthest = retrieval.farthest_copy(context, plan.span, bos=bos)
    distances = plan.distances or retrieval.default_distances(context, plan.span, bos=bos)
    copied: list[int | None] = [distance for distance in distances if distance <= farthest]
    first, last = retrieval.passkey_distances(stream, context, tokenizer=tokenizer, **shared)
    asked = [distance for distance in distances if first <= distance <= last]
    tokens, mask = document_rows(corpus.documents, context, plan.rows)
    nll, _ = _labeled(score, f"position, context {context}")(tokens)
    return Reach(
        corpus=corpus.name,
        context=context,
        copy=retrieval.measure_copy(
            _labeled(score, f"copy, context {context}"),
            stream,
            context,
            [*copied, None],
            span=plan.span,
            **shared,
        ),
        pass_keys=retrieval.measure_passkey(
            _labeled(score, f"pass keys, context {context}"),
            stream,
            context,
            asked,
            tokenizer=tokenizer,
            **shared,
        ),
        position=by_position(nll, position_edges(context), mask),
        whole=estimate(nll, mask),
    )


def _labeled(score: Callable[..., tuple[np.ndarray, np.ndarray]], label: str) -> Score:
    def labeled(
        tokens: Int32[np.ndarray, "rows tokens"],
    ) -> tuple[Float[np.ndarray, "rows targets"], Bool[np.ndarray, "rows targets"]]:
        return score(tokens, label=label)

    return labeled


def _stream(corpus: Corpus) -> Int32[np.ndarray, " tokens"]:
    """Returns the documents' text, one after the other, without what begins each."""
    return np.concatenate([document[1:] for document in corpus.documents])


def as_table(results: Sequence[Reach], plan: Plan, trained: int) -> str:
    """Returns the results as Markdown; contexts longer than the training's have a *.

    Args:
      results: the results.
      plan: what was measured.
      trained: tokens of a row in training.
    """

    def length(context: int) -> str:
        return f"{context}{' *' if context > trained else ''}"

    lines = [
        "| text | context | distance | copy, nats a token | saved by copying | pass keys right"
        " | key, nats a token |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in results:
        both = {distance for distance in found.copy if distance is not None} | set(found.pass_keys)
        for distance in sorted(both):
            copied, keys = found.copy.get(distance), found.pass_keys.get(distance)
            shown = (
                str(distance),
                _with_error(copied),
                _with_error(None if copied is None else copied.saved),
                _with_error(None if keys is None else keys.right),
                _with_error(None if keys is None else keys.nats),
            )
            lines.append(f"| {found.corpus} | {length(found.context)} | {' | '.join(shown)} |")
        nowhere = _with_error(found.copy.get(None))
        lines.append(
            f"| {found.corpus} | {length(found.context)} | nowhere | {nowhere} | - | - | - |"
        )
    parts = ["\n".join(lines)]
    lines = [
        "| text | context | position in the row | nats a token | rows | tokens |",
        "|---|---|---|---|---|---|",
    ]
    for found in results:
        buckets = {f"{start} to {stop - 1}": one for (start, stop), one in found.position.items()}
        for name, one in (buckets | {"all": found.whole}).items():
            lines.append(
                f"| {found.corpus} | {length(found.context)} | {name} | {_with_error(one)}"
                f" | {one.rows:,} | {one.count:,} |"
            )
    parts.append("\n".join(lines))
    parts.append(
        f"± standard error over rows. Copies and pass keys: {plan.rows:,} rows a figure, seed"
        f" {plan.seed}; {plan.span} tokens repeated, {plan.span - 1} of them scored."
    )
    if any(found.context > trained for found in results):
        parts.append(f"\\* longer than the rows of {trained} tokens the model was trained on")
    return "\n\n".join(parts)


def _with_error(found: Estimate | None) -> str:
    if found is None or not found.count:
        return "-"
    error = "" if math.isnan(found.stderr) else f" ± {found.stderr:.3f}"
    return f"{found.mean:.3f}{error}"


def as_data(results: Sequence[Reach], plan: Plan, trained: int) -> dict[str, Any]:
    """Returns the results as plain data, NaN as None; arguments as in `as_table`."""
    return {
        "trained_context": trained,
        **{name: getattr(plan, name) for name in ("span", "rows", "seed")},
        "results": [
            {
                "corpus": found.corpus,
                "context": found.context,
                "copy": [
                    {
                        "distance": distance,
                        **_plain(one),
                        "saved": None if one.saved is None else _plain(one.saved),
                    }
                    for distance, one in found.copy.items()
                ],
                "pass_keys": [
                    {"distance": distance, "right": _plain(one.right), "nats": _plain(one.nats)}
                    for distance, one in found.pass_keys.items()
                ],
                "position": [
                    {"first": start, "last": stop - 1, **_plain(one)}
                    for (start, stop), one in found.position.items()
                ],
                "whole": _plain(found.whole),
            }
            for found in results
        ],
    }


def _plain(found: Estimate) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in dataclasses.asdict(found).items()
        if name != "saved"
    }
