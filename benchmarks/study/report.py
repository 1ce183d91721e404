"""`python -m benchmarks.study report`: docs/results.md and its pictures from the lines."""

import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import tables
from benchmarks.study import options, plots, rule
from benchmarks.study.ledger import read_lines
from benchmarks.study.summary import Group, Line, Stat, good, groups, latest, main_tokens, stat
from benchmarks.study.variants import VARIANTS
from lazyattn.errors import InputError

# What docs/study.md registered.
_SWEPT = ("softmax", "softmax_alibi", "sharp")
_RATES = (1e-3, 2e-3, 4e-3)
_FACTORS = (1.0, 10.0, 30.0, 100.0)
_SEEDS = 3
_LONG = 320_000_000
_LONG_OF = ("softmax", "softmax_alibi", "sharp_qk_norm_steady")
_AT_BLANKS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
_BY_HAND = re.compile(r"<!-- by hand -->\n.*?<!-- end -->\n", re.DOTALL)


def define(values: flags.FlagValues) -> None:
    """Defines the flags."""
    where: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_list(
        "input", ["benchmarks/results/study.jsonl"], "Files of lines; a list.", **where
    )
    flags.DEFINE_string("output", "docs/results.md", "The page.", **where)
    flags.DEFINE_string("pictures", "docs/pictures", "Folder of the pictures.", **where)
    flags.DEFINE_string("tokens", None, "Of the runs to compare; default: the most.", **where)


def main(argv: Sequence[str], values: flags.FlagValues) -> None:
    """Writes the page and its pictures.

    Raises:
      InputError: if there is nothing to report.
    """
    options.parse(argv, values)
    lines: list[Line] = []
    for name in values.input:
        path = Path(name)
        if not path.exists():
            raise InputError(f"--input is {name!r}, but it must be a file of lines.")
        lines += read_lines(path)
    tokens = (
        main_tokens(lines) if values.tokens is None else options.whole("--tokens", values.tokens)
    )
    if tokens is None or not groups(lines, tokens):
        raise InputError(
            f"--input has no finished run of {tokens or 'any'} tokens, measured in full."
        )
    output = Path(values.output)
    found = _in_order(groups(lines, tokens))
    pictures = plots.draw(found, Path(values.pictures))
    old = output.read_text() if output.exists() else ""
    places = {name: _relative(path, output.parent) for name, path in pictures.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(lines, tokens, places, by_hand(old), values.input))
    if output.resolve() == tables.ROOT / "docs" / "results.md":
        tables.main([])  # README has some of these figures


def by_hand(old: str) -> str:
    """Returns the part of a page that was written by hand, which is kept."""
    match = _BY_HAND.search(old)
    return match.group() if match else "<!-- by hand -->\n<!-- end -->\n"


def _relative(path: Path, folder: Path) -> str:
    try:
        return str(path.relative_to(folder))
    except ValueError:
        return str(path)


def _in_order(found: dict[str, Group]) -> dict[str, Group]:
    order = {name: number for number, name in enumerate(VARIANTS)}
    names = sorted(found, key=lambda name: (order.get(name, len(order)), name))
    return {name: found[name] for name in names}


def page(
    lines: Sequence[Line], tokens: int, pictures: dict[str, str], kept: str, files: Sequence[str]
) -> str:
    """Returns the page.

    Args:
      lines: of all runs.
      tokens: of the runs that are compared.
      pictures: places of the pictures, by name.
      kept: what was written by hand.
      files: where the lines are from.
    """
    found = _in_order(groups(lines, tokens))
    verdict = rule.apply(lines, tokens)
    parts = [
        "# Results of the study",
        _head(lines, found, tokens, files),
        kept.rstrip("\n"),
        "## The rule's outcome",
        _outcome(verdict),
        _verdict_table(verdict),
        "## What is missing",
        _missing(lines, found, tokens),
        "## Loss",
        _losses(found),
        _picture(pictures, "loss", "Training loss by tokens and by time"),
        "## Longer rows, and loss by position",
        _lengths(found),
        _picture(pictures, "positions", "Validation loss by what a prediction sees"),
        "## Retrieval",
        "Copying: nats a token of 64 text tokens that stood so many tokens before;"
        " `nothing`: they did not.",
        _by_distance(found, "copy", 2),
        "Pass keys: share of rows in which the number is repeated exactly.",
        _by_distance(found, "passkey", 2),
        _picture(pictures, "retrieval", "Copying and pass keys by distance"),
        "## What attention does",
        _attention(found),
        _picture(pictures, "visited", "Share of the tiles visited during training"),
        _heads(found),
        "## Sweeps",
        _sweeps(lines),
        "## Longer runs",
        _longer(lines, tokens),
        _failures(lines),
    ]
    hand = kept.rstrip("\n")
    return "\n\n".join(x if x == hand else _wrapped(x) for x in parts if x) + "\n"


def _wrapped(part: str) -> str:
    """Returns prose in lines of at most 100; tables and pictures as they are."""
    lines = []
    for line in part.split("\n"):
        if line.startswith(("|", "!", "#")):
            lines.append(line)
        else:
            indent = "  " if line.startswith("- ") else ""
            lines.append(textwrap.fill(line, 100, subsequent_indent=indent, **_AT_BLANKS))
    return "\n".join(lines)


def _head(lines: Sequence[Line], found: dict[str, Group], tokens: int, files: Sequence[str]) -> str:
    used = [line for group in found.values() for line in group.lines]

    def all_of(get: Callable[[Line], Any], most: int = 4) -> str:
        values = sorted({str(get(line)) for line in used})
        return ", ".join(values[:most]) + (" and others" if len(values) > most else "")

    days = sorted(str(line.get("date", "?"))[:10] for line in used)
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    epochs = max(float(line.get("epochs") or 0) for line in used)
    round_again = f" The text was gone through {epochs:.2f} times." if epochs > 1 else ""
    every = good(lines, everything=False)
    total = sum(int(line["tokens"]) for line in every)
    return (
        f"Written by `python -m benchmarks.study report` from {', '.join(f'`{f}`' for f in files)};"
        f" what is asked, the measures and the rule are in [study.md](study.md).\n\n"
        f"{len(used)} runs of {len(found)} variants, {_millions(tokens)} tokens each"
        f" ({len(every)} runs of {total / 1e9:.2f}B tokens with the sweeps);"
        f" {when}, {all_of(lambda line: line.get('device'))},"
        f" jax {all_of(lambda line: line.get('jax'))}, commits"
        f" {all_of(lambda line: str(line.get('commit'))[:10])}."
        f" RFCs, kernel code and textbooks, not web text.{round_again}"
        " ± is the standard error over seeds; where there is none, there is one seed."
        "\n\nSlopes learn at the common rate, the trainer's default, in variants called `steady`"
        " and at 30 times it (`optimizer.log_slope_factor`) in the others. So the recipe `sharp` is"
        " `sharp_steady` here, and `sharp_norm` is `sharp_qk_norm_steady`."
    )


def _outcome(verdict: rule.Verdict) -> str:
    if verdict.gain is None:
        worth = (
            "What more tokens are worth isn't known (no variant has runs of"
            f" {_millions(rule.SWEEP_TOKENS)} and of {_millions(verdict.tokens)} tokens at one"
            " learning rate), so loss at equal time can't be told and no variant can win."
        )
    else:
        worth = (
            f"A factor of e in tokens is worth {verdict.gain:.3f} nats, by"
            f" {', '.join(f'`{name}`' for name in verdict.gain_from)}."
        )
    if verdict.winner is not None:
        return f"**The rule chooses `{verdict.winner}`.** {worth}"
    untold = [
        row.group.variant
        for row in verdict.rows
        if row.equal is None or None in [check.passed for check in row.checks.values()]
    ]
    text = f"**No variant passes all of the rule.** {worth}"
    if untold:
        text += f" Something can't be told of {', '.join(f'`{name}`' for name in untold)}."
    return text


def _verdict_table(verdict: rule.Verdict) -> str:
    names = {
        "copying": "copying, worst against softmax",
        "length": "val_4x - val <= 0.02",
        "visited_4096": "visited at 4,096 <= 0.55",
        "visited_16384": "at 16,384 <= 0.30",
    }
    rows = []
    for row in verdict.rows:
        cells = [f"`{row.group.variant}`", str(len(row.group.lines)), row.val.text()]
        cells.append("" if row.ms is None else f"{row.ms.mean:.1f}")
        cells.append("?" if row.equal is None else f"{row.equal:.3f}")
        for name in names:
            check = row.checks[name]
            sign = {True: "passes", False: "**fails**", None: "?"}[check.passed]
            cells.append(f"{sign}: {check.text}")
        rows.append(cells)
    head = ["variant", "seeds", "val", "ms a step", "loss at equal time", *names.values()]
    return _table(head, rows)


def _missing(lines: Sequence[Line], found: dict[str, Group], tokens: int) -> str:
    missing = []
    absent = [name for name in VARIANTS if name not in found]
    if absent:
        missing.append(f"No run of {', '.join(f'`{name}`' for name in absent)}.")
    few = [f"`{n}` ({len(g.lines)})" for n, g in found.items() if len(g.lines) < _SEEDS]
    if few:
        missing.append(f"Fewer than {_SEEDS} seeds: {', '.join(few)}.")
    short = good(lines, everything=False)
    swept = {
        (line["variant"], float(line["learning_rate"]))
        for line in short
        if int(line["tokens"]) == rule.SWEEP_TOKENS
    }
    rates = [f"`{n}` at {r:g}" for n in _SWEPT for r in _RATES if (n, r) not in swept]
    if rates:
        missing.append(f"Learning rates not swept: {', '.join(rates)}.")
    factors = {
        float(line["log_slope_factor"])
        for line in short
        if line["variant"] == "sharp" and line.get("log_slope_factor") is not None
    }
    left = [f"{factor:g}" for factor in _FACTORS if factor not in factors]
    if left:
        missing.append(f"Factors of theta's learning rate not swept: {', '.join(left)}.")
    long = {line["variant"] for line in short if int(line["tokens"]) == _LONG}
    left = [f"`{name}`" for name in _LONG_OF if name not in long]
    if left:
        missing.append(f"No run of {_millions(_LONG)} tokens of {', '.join(left)}.")
    if tokens != 100_000_000:
        missing.append(f"The runs are of {_millions(tokens)} tokens, not of 100M as registered.")
    return "\n".join(f"- {text}" for text in missing) if missing else "Nothing that was registered."


def _losses(found: dict[str, Group]) -> str:
    rows = []
    for name, group in sorted(found.items(), key=lambda item: item[1].stat("val").mean):  # type: ignore
        val = group.stat("val")
        assert val is not None
        rows.append(
            [
                f"`{name}`",
                f"{group.learning_rate:g}",
                val.text(),
                f"{val.worst:.3f}",
                *(_cell(group.stat(f"val_{part}")) for part in ("rfc", "code", "books")),
                _cell(group.stat("ms_per_step"), 1),
                ", ".join(sorted({str(line.get("attention_by")) for line in group.lines})),
                f"{group.lines[0].get('parameters', 0) / 1e6:.1f}M",
            ]
        )
    head = "variant|lr|val|worst seed|rfc|code|books|ms a step|attention by|parameters"
    return _table(head.split("|"), rows)


def _lengths(found: dict[str, Group]) -> str:
    rows = []
    for name, group in found.items():
        cells = [f"`{name}`", *(_cell(group.stat(key)) for key in ("val", "val_2x", "val_4x"))]
        lost = group.stat(
            lambda line: None if line.get("val_4x") is None else line["val_4x"] - line["val"]
        )
        rows.append([*cells, "" if lost is None else f"{lost.mean:+.3f}, worst {lost.worst:+.3f}"])
    return _table(["variant", "rows of 4,096", "8,192", "16,384", "16,384 - 4,096"], rows)


def _by_distance(found: dict[str, Group], key: str, digits: int) -> str:
    names: dict[str, None] = {}
    for group in found.values():
        for line in group.lines:
            names |= dict.fromkeys(line.get(key) or {})
    order = sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0))
    if not order:
        return "Not measured."
    rows = [
        [
            f"`{variant}`",
            *(
                _cell(stat((line.get(key) or {}).get(at) for line in group.lines), digits)
                for at in order
            ),
        ]
        for variant, group in found.items()
    ]
    return _table(["variant", *order], rows)


def _attention(found: dict[str, Group]) -> str:
    rows = []
    for name, group in found.items():
        keys = ("visited_4096", "live_4096", "visited_16384", "live_16384")
        cells = [f"`{name}`", *(_cell(group.stat(key), 2) for key in keys)]
        worst = [group.stat(key) for key in ("visited_4096", "visited_16384")]
        cells.append(" / ".join("" if x is None else f"{x.worst:.2f}" for x in worst))
        cells += [_cell(group.stat(key), 2) for key in ("sink", "mass", "zeros")]
        cells.append(_cell(group.stat(lambda line: max(line.get("kurtosis") or [0]) or None), 1))
        rows.append(cells)
    head = (
        "variant|visited 4,096|live|visited 16,384|live|worst seeds|sink|mass|zeros"
        "|kurtosis, largest layer"
    )
    return _table(head.split("|"), rows)


def _heads(found: dict[str, Group]) -> str:
    rows = []
    for name, group in found.items():
        cells = [f"`{name}`"]
        for key in ("spans", "offsets"):
            values = sorted(
                x for line in group.lines for layer in line.get(key) or [] for x in layer
            )
            cells.append(_quantiles(values))
        slopes = [x for line in group.lines for layer in line.get("slopes") or [] for x in layer]
        rising = sum(x < 0 for x in slopes) / len(slopes) if slopes else None
        cells.append("" if rising is None else f"{rising:.0%}")
        if any(cells[1:]):
            rows.append(cells)
    if not rows:
        return ""
    text = "What heads have learned: least, quartiles and greatest over layers, heads and seeds."
    head = ["variant", "span, tokens (16,384: never ends)", "tau", "tails that rise"]
    return f"{text}\n\n{_table(head, rows)}"


def _quantiles(values: Sequence[float]) -> str:
    if not values:
        return ""
    last = len(values) - 1
    picked = (values[round(last * q / 4)] for q in range(5))
    return " / ".join(f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}" for x in picked)


def _sweeps(lines: Sequence[Line]) -> str:
    kinds: dict[tuple[str, str], dict[float, list[float]]] = {}
    for line in good(lines, everything=False):
        if int(line["tokens"]) != rule.SWEEP_TOKENS:
            continue
        factor = line.get("log_slope_factor")
        kind = str(line["variant"]), "" if factor is None else f"{factor:g}"
        own = kinds.setdefault(kind, {})
        own.setdefault(float(line["learning_rate"]), []).append(float(line["val"]))
    if not kinds:
        return f"No runs of {_millions(rule.SWEEP_TOKENS)} tokens."
    rates = sorted({rate for own in kinds.values() for rate in own})
    rows = []
    for (variant, factor), own in sorted(kinds.items()):
        means = {rate: _mean(values) for rate, values in own.items()}
        best = min(means.values())
        cells = [
            ""
            if rate not in means
            else f"**{means[rate]:.3f}**"
            if means[rate] == best
            else f"{means[rate]:.3f}"
            for rate in rates
        ]
        rows.append([f"`{variant}`", factor, *cells])
    text = f"Validation loss after {_millions(rule.SWEEP_TOKENS)} tokens, by learning rate."
    head = ["variant", "factor of theta's rate", *(f"{rate:g}" for rate in rates)]
    return f"{text}\n\n{_table(head, rows)}"


def _longer(lines: Sequence[Line], tokens: int) -> str:
    others = sorted({int(line["tokens"]) for line in good(lines)} - {tokens, rule.SWEEP_TOKENS})
    rows = []
    for other in others:
        for name, group in _in_order(groups(lines, other)).items():
            epochs = max(float(line.get("epochs") or 0) for line in group.lines)
            keys = ("val", "val_4x", "ms_per_step", "visited_4096", "visited_16384")
            cells = [_cell(group.stat(key), 1 if key == "ms_per_step" else 3) for key in keys]
            size = str(len(group.lines))
            rows.append([_millions(other), f"`{name}`", size, f"{epochs:.2f}", *cells])
    if not rows:
        return "None."
    head = "tokens|variant|seeds|epochs|val|val_4x|ms a step|visited 4,096|16,384"
    return _table(head.split("|"), rows)


def _failures(lines: Sequence[Line]) -> str:
    failed = [line for line in latest(lines) if "error" in line]
    if not failed:
        return ""
    rows = [f"- `{line.get('id')}`: {line['error']}" for line in failed]
    return "\n".join(["## Runs that failed\n", *rows])


def _picture(pictures: dict[str, str], name: str, text: str) -> str:
    return f"![{text}]({pictures[name]})" if name in pictures else ""


def _mean(values: Sequence[float]) -> float:
    found = stat(values)
    assert found is not None
    return found.mean


def _cell(found: Stat | None, digits: int = 3) -> str:
    return "" if found is None else found.text(digits)


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:g}M"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
