"""The report: one page that needs nothing but itself, and its numbers as JSON."""

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lazyattn.inspect.cache import cache_section
from lazyattn.inspect.sections import SECTIONS, Section
from lazyattn.quantity import quantity

_PAGE = Path(__file__).parent / "page"
# Nothing may be fetched: the browser itself refuses.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_report(folder: Path, data: dict[str, Any]) -> None:
    """Writes `report.html` and `report.json`.

    Args:
      folder: made if need be.
      data: "text" (what was read) and "models", as `figures.model_data` returns them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(data), encoding="utf-8")


def page(data: dict[str, Any]) -> str:
    """Returns the page; what is shown is drawn by its script from the data inside it."""
    models = data["models"]
    sections = [s for s in SECTIONS if s.applies(models)]
    contents = "".join(f'<li><a href="#{s.id}">{s.title}</a></li>' for s in sections)
    title = "Attention of " + " and ".join(html.escape(m["label"]) for m in models)
    # "<" would end the script element wherever a token is "</script>".
    numbers = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    styles, drawing, figures = (
        (_PAGE / name).read_text(encoding="utf-8")
        for name in ("report.css", "draw.js", "report.js")
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{styles}</style>
</head>
<body>
<div class="layout">
<nav aria-label="Contents"><strong>Attention report</strong>
<ol><li><a href="#summary">At a glance</a></li>{contents}<li><a href="#cache">Cache</a></li></ol>
<button id="theme" type="button">Dark colours</button></nav>
<main>
<header><h1>{title}</h1>{_about(data)}</header>
<section id="summary"><h2>At a glance</h2>
<p>Means over all layers and heads, unless a row says otherwise.</p>
<figure><div class="scroll">{_summary(models)}</div></figure></section>
{"".join(_section(s) for s in sections)}{cache_section(models)}
<noscript>The figures are drawn by a script inside this page, which is switched off.</noscript>
</main>
</div>
<div id="tip" role="status" hidden></div>
<script type="application/json" id="data">{numbers}</script>
<script>
{drawing}</script>
<script>
{figures}</script>
</body>
</html>
"""


def _about(data: dict[str, Any]) -> str:
    first = data["models"][0]
    rows = f"{quantity(first['rows'], 'row')} of {quantity(first['length'], 'token')}"
    entries = "".join(
        f'<li><i class="dot" style="background:var(--series-{number})"></i>'
        f"<span><b>{html.escape(model['label'])}</b><br><small>{html.escape(model['variant'])},"
        f" step {model['step']:,}, {model['parameters']:,} parameters,"
        f" {quantity(model['layers'], 'layer')} of {quantity(model['heads'], 'head')},"
        f" trained on rows of {model['trained_length']}</small></span></li>"
        for number, model in enumerate(data["models"])
    )
    return (
        f"<p>Measured on {html.escape(data['text'])}: {rows}, each of one document. The numbers of"
        f' every figure are in <code>report.json</code>.</p><ul class="key">{entries}</ul>'
    )


def _section(section: Section) -> str:
    figures = "".join(
        f"<figure><h3>{f.title}</h3><div data-figure='{f.name}'></div>"
        f"<figcaption>{f.caption}</figcaption></figure>"
        for f in section.figures
    )
    return (
        f'<section id="{section.id}"><h2>{section.title}</h2><p>{section.text}</p>'
        f"{figures}</section>\n"
    )


def _share(value: float) -> str:
    return f"{value:.2%}" if 0 < value < 0.1 else f"{value:.1%}"


_ROWS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("zeros", "Weights that are exactly 0", "share of the visible pairs", _share),
    ("silent", "Queries that attend to nothing", "share of queries", _share),
    ("mass", "Weight that is kept", "sum of a query's weights; 1 for softmax", "{:.3f}".format),
    ("first_token", "Weight on the first token", "mean over later queries", _share),
    ("first_share", "Share of the kept weight on the first token", "the rest is elsewhere", _share),
    (
        "sink",
        "Sink metric, first token",
        "share of heads above 0.3, sequences of 64 tokens",
        _share,
    ),
    ("visited_64", "Visited tiles", "share of the causal tiles of 64 x 64", _share),
    ("live_64", "Live tiles", "share of the causal tiles of 64 x 64", _share),
    ("training_64", "Training cost over softmax", "counted in tile products", "{:.2f}".format),
    ("inference_64", "Inference cost over softmax", "counted in tile products", "{:.2f}".format),
    ("span", "Span", "tokens, 95% of the kept weight", "{:,.0f}".format),
    ("entropy", "Entropy of the kept weights", "nats", "{:.2f}".format),
    ("cosine", "Cosine of two tokens' states", "after the last layer", "{:.3f}".format),
    ("massive", "Largest activation", "over its layer's median magnitude", "{:,.0f}".format),
    ("rollout_first", "Rollout on the first token", "after the last layer", _share),
)


def _summary(models: Sequence[dict[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(model['label'])}</th>" for model in models)
    rows = "".join(
        f"<tr><td>{name}<small>{unit}</small></td>"
        + "".join(f"<td>{form(model['summary'][key])}</td>" for model in models)
        + "</tr>"
        for key, name, unit, form in _ROWS
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
