"""What a cache holds of a model's keys and values, by context length: its spans and bytes."""

import html
from collections.abc import Sequence
from typing import Any

from lazyattn.checkpoint.load import TrainedModel
from lazyattn.generation import spans
from lazyattn.generation.cache import CacheOptions, in_bytes

# Besides the length of the rows that a model was trained on.
_CONTEXTS = (4096, 16_384, 32_768, 131_072)


def cache_data(model: TrainedModel) -> dict[str, Any]:
    """Returns bytes of a row's keys and values by context, and each head's span.

    `spans` are of the longest context: how many of its last keys a head can ever need, by
    layer and head. `why` says why none forgets; None: some may.
    """
    config, params = model.experiment.model, model.params
    contexts = sorted({model.experiment.data.sequence_length, *_CONTEXTS})
    plans = {
        kind: [
            spans.plan_by(params, config, context, CacheOptions(kind=kind)) for context in contexts
        ]
        for kind in ("full", "spans")
    }
    return {
        "contexts": contexts,
        "full_bytes": [plan.row_bytes for plan in plans["full"]],
        "spans_bytes": [plan.row_bytes for plan in plans["spans"]],
        "spans": spans.head_spans(params, config, contexts[-1]).tolist(),
        "why": spans.everything_kept(params, config),
    }


def cache_table(models: Sequence[dict[str, Any]]) -> str:
    """Returns the bytes of models side by side, for the terminal."""
    width = max(22, *(len(model["label"]) + 2 for model in models))
    lines = ["bytes of keys and values of a row".ljust(38)]
    lines[0] += "".join(f"{model['label']:>{width}}" for model in models)
    for context in _contexts(models):
        values = (_bytes(model["cache"], context) for model in models)
        line = f"  {context:,} tokens".ljust(38)
        lines.append(line + "".join(f"{value:>{width}}" for value in values))
    for model in models:
        if model["cache"]["why"] is not None:
            lines.append(
                f"{model['label']}: every head keeps all it sees, since {model['cache']['why']}"
            )
    return "\n".join(lines)


def cache_section(models: Sequence[dict[str, Any]]) -> str:
    """Returns the page's section."""
    head = "".join(f"<th>{html.escape(model['label'])}</th>" for model in models)
    rows = "".join(
        f"<tr><td>{context:,} tokens</td>"
        + "".join(f"<td>{_bytes(model['cache'], context)}</td>" for model in models)
        + "</tr>"
        for context in _contexts(models)
    )
    longest = "".join(
        f"<tr><td>{name} of the longest context</td>"
        + "".join(f"<td>{_quantile(model['cache'], share)}</td>" for model in models)
        + "</tr>"
        for name, share in (("Shortest span", 0.0), ("Median span", 0.5), ("Longest span", 1.0))
    )
    reasons = "".join(
        f"<p>{html.escape(model['label'])}: every head keeps all it sees, since"
        f" {html.escape(model['cache']['why'])}.</p>"
        for model in models
        if model["cache"]["why"] is not None
    )
    return (
        '<section id="cache"><h2>Cache</h2><p>A head whose scores are bounded (qk_norm) and whose'
        " bias falls can need only its last keys: all others together hold less than skip_mass of"
        " its softmax, whatever the text. Bytes of a row's keys and values in a cache that keeps"
        " these (--mode=sample --cache=spans), and their share of all.</p>"
        f'<figure><div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{rows}{longest}</tbody></table></div></figure>{reasons}</section>\n"
    )


def _contexts(models: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({context for model in models for context in model["cache"]["contexts"]})


def _bytes(cache: dict[str, Any], context: int) -> str:
    if context not in cache["contexts"]:
        return "-"
    at = cache["contexts"].index(context)
    held, full = cache["spans_bytes"][at], cache["full_bytes"][at]
    return f"{in_bytes(held)} ({held / full:.1%})"


def _quantile(cache: dict[str, Any], share: float) -> str:
    ordered = sorted(span for layer in cache["spans"] for span in layer)
    return f"{ordered[round(share * (len(ordered) - 1))]:,}"
