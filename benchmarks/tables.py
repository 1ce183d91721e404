"""Tables of the documents, made from `benchmarks/results/`.

    python -m benchmarks.tables             # writes them into the documents
    python -m benchmarks.tables --check     # status 1 if one differs from its results

A document holds `<!-- table: NAME -->` and `<!-- end of table -->`, with nothing by hand
between them.
"""

import json
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.study import rule, taught
from benchmarks.study.summary import main_tokens

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_BACKENDS = ("mosaic_gpu", "triton", "tpu", "xla_chunked")
_CASES = ("dense", "alibi", "learned", "biased_softmax")

Row = dict[str, Any]
# The study's variant that is the recipe `sharp_norm`.
_CHOSEN = "sharp_qk_norm_steady"


def documents() -> list[pathlib.Path]:
    """Returns the documents that may hold tables."""
    return [ROOT / "README.md", ROOT / "BUILD.md", *sorted((ROOT / "docs").rglob("*.md"))]


def render(text: str) -> str:
    """Returns a document's text with all of its tables as the results give them."""
    return _PLACE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", text)


def _table(head: str, rows: list[list[str]]) -> str:
    columns = head.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _gpu(device: str) -> str:
    return device.removeprefix("NVIDIA ").split()[0]


def _short(implementation: str) -> str:
    """Leaves out the block sizes that a peer's name may carry."""
    return implementation.split(" ")[0]


def attention_rows() -> list[Row]:
    """Returns a row for each call that `benchmarks.attention` timed, both passes in one.

    `forward` and `training` hold that pass's entry of the file, with `ratio`, its time over
    cuDNN softmax's in the same run.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    for path in sorted(RESULTS.glob("*.json")):
        about = json.loads(path.read_text())
        results = about.get("results", [{}])
        if not {"implementation", "shape", "which"} <= results[0].keys():
            continue
        cudnn = {
            (entry["shape"], entry["which"]): entry["milliseconds"]
            for entry in results
            if entry["implementation"] == "cudnn" and not entry["error"]
        }
        for entry in results:
            if entry["implementation"] == "cudnn" or entry["error"]:
                continue
            base = cudnn.get((entry["shape"], entry["which"]))
            name = _short(entry["implementation"])
            row = rows.setdefault(
                (path.stem, entry["shape"], entry["case"], name),
                {
                    "gpu": _gpu(about["device"]),
                    "date": about.get("date", ""),
                    "note": about.get("note", ""),
                    "matmul": about.get("matmul_teraflops"),
                    "window": about.get("window"),
                    "shape": entry["shape"],
                    "case": entry["case"],
                    "implementation": name,
                },
            )
            ratio = entry["milliseconds"] / base if base else None
            row[entry["which"]] = entry | {"ratio": ratio}
    return sorted(rows.values(), key=_order)


def _order(row: Row) -> tuple[Any, ...]:
    backend, case = row["implementation"], row["case"]
    ours = _BACKENDS.index(backend) if backend in _BACKENDS else len(_BACKENDS)
    _, _, length, head_dim, *_ = (int(size) for size in row["shape"].split("x"))
    place = _CASES.index(case) if case in _CASES else len(_CASES)
    return (ours, backend, row["gpu"] == "H100", head_dim, length, row["window"] or 0, place)


def attention() -> str:
    """The op's kernels, and peers, on GPUs."""
    notes = sorted({row["note"] for row in attention_rows() if row["note"]})
    lines = []
    for row in attention_rows():
        forward, training = row.get("forward", {}), row.get("training", {})
        work, matmul = training.get("work"), row["matmul"]
        case = row["case"] or "softmax"
        if row["window"]:
            case += f", window {row['window']}"
        mark = "*" * (notes.index(row["note"]) + 1) if row["note"] else ""
        lines.append(
            [
                row["implementation"] + mark.replace("*", "\\*"),
                row["gpu"],
                row["shape"],
                case,
                _number(forward.get("visited"), 2),
                _number(forward.get("live"), 2),
                _number(forward.get("milliseconds"), 3),
                _number(forward.get("ratio"), 2),
                _number(training.get("milliseconds"), 3),
                _number(training.get("ratio"), 2),
                _number(work, 0),
                _number(work / matmul if work and matmul else None, 2),
                _number(training.get("temporary_arrays"), 2),
                row["date"],
            ]
        )
    head = (
        "kernels | GPU | shape | case | visited | live | forward, ms | x cuDNN"
        " | forward and backward, ms | x cuDNN | TFLOP/s done | of matmul | memory | date"
    )
    marks = "".join(f"\n{'\\*' * (n + 1)} {note}.\n" for n, note in enumerate(notes))
    return _table(head, lines) + marks


def _ratio(row: Row, which: str) -> str:
    return _number(row[which]["ratio"], 2)


def readme() -> str:
    """README's choice of the H200's rows, and attention in a model of the study."""
    words = {
        ("4x16x4096x64", "learned"): "learned biases, random queries and keys",
        ("4x16x4096x64", "alibi"): "ALiBi bias, tau -1",
        ("1x16x16384x64", "alibi"): "the same at length 16,384",
        ("4x16x4096x64", "dense"): "the paper's initialization, nothing to skip",
        ("4x16x4096x64", "biased_softmax"): "no offset: softmax with a learned bias",
    }
    rows = {
        (row["shape"], row["case"]): row
        for row in sorted(attention_rows(), key=lambda row: row["date"])  # the newest stays
        if (row["gpu"], row["implementation"], row["window"]) == ("H200", "mosaic_gpu", None)
    }
    lines = []
    for key, said in words.items():
        row = rows[key]
        shares = [f"{row['forward'][name]:.0%}" for name in ("visited", "live")]
        lines.append([said, *shares, _ratio(row, "forward"), _ratio(row, "training")])
    lines[3:3] = _study()
    return _table(" | visited | live | forward | forward and backward", lines)


def _study() -> list[list[str]]:
    path = RESULTS / "study.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    tokens = main_tokens(runs)
    runs = [run for run in runs if (run["variant"], run["tokens"]) == (_CHOSEN, tokens)]
    runs = [run for run in runs if run.get("attention_ms")]
    if not runs:
        return []
    said = ["a model of the study, its own queries and keys", "the same at length 16,384"]
    lines = []
    for text, length in zip(said, (4096, 16_384), strict=True):
        times = [run["attention_ms"][f"3x{length}"] for run in runs]
        ratios = [
            sum(of[which] for of in times) / sum(of[f"softmax_{which}"] for of in times)
            for which in ("forward", "training")
        ]
        shares = [
            sum(run[f"{name}_{length}"] for run in runs) / len(runs) for name in ("visited", "live")
        ]
        cells = [*(f"{share:.0%}" for share in shares), *(f"{ratio:.2f}" for ratio in ratios)]
        lines.append([text, *cells])
    return lines


def loss() -> str:
    """README's choice of the study's variants: means over seeds."""
    words = {
        "softmax": "softmax",
        "window512": "softmax, 3/4 of the heads with a window of 512",
        "softmax_alibi": "softmax with a learned bias, slopes at 30 times the rate",
        "sharp": "the same with Elastic-Softmax",
        "softmax_alibi_qk_norm_steady": "softmax with a learned bias and QK norm",
        _CHOSEN: "the same with Elastic-Softmax: `sharp_norm`, our default",
    }
    lines = [json.loads(line) for line in (RESULTS / "study.jsonl").read_text().splitlines()]
    found = {row.group.variant: row for row in rule.apply(lines, main_tokens(lines) or 0).rows}
    rows = []
    for variant, said in words.items():
        if variant in found:
            row = found[variant]
            means = [row.group.stat(key) for key in ("val_4x", "visited_16384")]
            longer = "" if means[0] is None else f"{means[0].mean:.2f}"
            visited = "" if means[1] is None else f"{means[1].mean:.0%}"
            ms = "" if row.ms is None else f"{row.ms.mean:.0f}"
            seeds = str(len(row.group.lines))
            rows.append([said, seeds, row.val.text(), ms, longer, visited])
    head = "| seeds | loss | ms a step | loss at 16,384 | visited there"
    return _table(" " + head, rows)


def uptraining() -> str:
    """Softmax models of the study that were taught to be lazy: means over seeds."""
    path = RESULTS / "uptraining.jsonl"
    if not path.exists():
        return "Not measured yet.\n"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return _table(taught.HEAD, taught.table(lines))


def train_step() -> str:
    """A whole training step of the 340M model."""
    lines = []
    for path in sorted(RESULTS.glob("*train_step.json")):
        about = json.loads(path.read_text())
        rates = {row["attention"]: row["tokens_per_second"] for row in about["results"]}
        for row in about["results"]:
            lines.append(
                [
                    row["attention"],
                    _gpu(about["device"]),
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['tokens_per_second'] / rates['cudnn']:.2f}",
                    f"{row['milliseconds']:.1f}",
                    f"{row['mfu']:.1%}",
                    f"{(row['arguments'] + row['temporaries']) / 2**30:.2f}",
                    about["date"],
                ]
            )
    head = "attention | GPU | tokens/s | over cuDNN's | ms a step | MFU | GiB a device | date"
    return _table(head, lines)


def steps() -> str:
    """Whole training steps, ours and the peer's, without remat unless the name says it."""
    found = {}
    for path in sorted(RESULTS.glob("*_step.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            if "error" not in row and row["command_buffers"]:
                found[row["commit"], row["run"]] = row
    lines = []
    for (commit, run), row in found.items():
        same_run = commit, run.replace(f"/{row['attention']}/", "/cudnn/")
        rate, cudnn = row["tokens_per_second"], found.get(same_run)
        warm = row.get("first_step_warm_s")
        lines.append(
            [
                run.removesuffix("/none").replace("/none/", "/"),
                _gpu(row["device"]),
                f"{rate:,.0f}",
                "" if cudnn is None else f"{rate / cudnn['tokens_per_second']:.2f}",
                f"{row['ms']:.1f}",
                f"{row['mfu']:.1%}",
                f"{row['gib']:.1f}",
                f"{row['first_step_cold_s']:.0f} s",
                "" if warm is None else f"{warm:.0f} s",
                f"{row['date']}, {commit[:7]}",
            ]
        )
    head = (
        "model/attention/length | GPU | tokens/s | over cuDNN's | ms a step | MFU | GiB"
        " | first step | with a cache | date, commit"
    )
    return _table(head, lines)


def decoding() -> str:
    """A token's time beside that of a copy: of each case the newest line that has one."""
    found = {}
    for path in sorted(RESULTS.glob("*_decode.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            # Lines without jax_triton are of kernels outside of CUDA graphs; a step in few
            # kernels (`fused`) is gone.
            if row["ms_attention"] and row.get("jax_triton") and not row.get("fused"):
                case = (row["implementation"], row["attention"], row["cache"], row["slopes"])
                found[row["context"], row["batch"], *case] = row
    lines = []

    def order(item: tuple[tuple[Any, ...], Row]) -> tuple[Any, ...]:
        context, batch, implementation, attention, *_ = item[0]
        return context, batch, implementation != "lazyattn", attention != "softmax"

    for (context, batch, *_), row in sorted(found.items(), key=order):
        cache = f"{row['attention']}, {row['cache']}"
        if row["implementation"] != "lazyattn":
            cache += f", by {row['implementation']}"
        elif row["slopes"] not in ("alibi", "none"):
            cache += ", trained slopes"
        cells = [f"{context:,} x {batch}", cache]
        for share in (row["cache_bytes_share"], row["read_share"]):
            cells.append(f"{share:.0%}" if share >= 0.1 else f"{share:.1%}")
        for ms, limit in (("ms_attention", "limit_attention_ms"), ("ms_token", "limit_ms")):
            time = row[ms]
            cells.append("" if time is None else _number(time, 1 if time >= 10 else 2))
            cells.append("" if time is None else f"{time / row[limit]:.2f}")
        fit = row["largest_batch"]
        cells.append("" if fit is None else str(fit))
        lines.append([*cells, f"{row['date']}, {row['commit'][:7]}"])
    head = (
        "context x rows | attention, cache | held | read | attention, ms | times a copy | token, ms"
        " | times a copy | rows that fit | date, commit"
    )
    return _table(head, lines)


def scaling() -> str:
    """A step on several GPUs."""
    lines = []
    for path in sorted(RESULTS.glob("*scaling.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            if "error" in row:
                continue

            def cell(name: str, form: str, row: dict[str, Any] = row) -> str:
                return "" if row.get(name) is None else format(row[name], form)

            millions = row["parameters"] / 1e6 if "parameters" in row else None
            mesh = row.get("mesh", row.get("axis"))
            lines.append(
                [
                    str(row["devices"]),
                    _gpu(row["device"]),
                    "" if millions is None else f"{millions:,.0f}M",
                    str(row["length"]),
                    row.get("attention", row.get("variant")),
                    "" if mesh is None else f"`{mesh}` {row.get('scaling', 'weak')}",
                    cell("ms", ".1f"),
                    cell("tokens_per_second", ",.0f"),
                    cell("efficiency", ".1%"),
                    cell("mfu", ".1%"),
                    cell("gib", ".1f"),
                    cell("collectives_ms", ".1f"),
                    cell("hidden", ".0%"),
                ]
            )
    head = (
        "GPUs | of | parameters | tokens a row | attention | mesh, scaling | ms a step | tokens/s"
        " | efficiency | MFU | GiB a GPU | ms in collectives | of it hidden"
    )
    return _table(head, lines)


def slices() -> str:
    """What `train.py --mode=compile` says of the recipes."""
    from benchmarks import compile_table

    lines = (RESULTS / "compile_table.jsonl").read_text().splitlines()
    rows = compile_table.in_order([json.loads(line) for line in lines])
    return "\n".join(compile_table.table(rows)) + "\n"


def data() -> str:
    """What reading shards reaches."""
    results = json.loads((RESULTS / "data.json").read_text())["results"]
    by_key = {(row["length"], row["packing"], row["num_workers"]): row for row in results}
    lines = []
    for (length, packing, workers), row in by_key.items():
        if workers:
            continue
        two = by_key[length, packing, 2]
        lines.append(
            [
                str(length),
                f"`{packing}`",
                f"{row['efficiency']:.1%}",
                f"{row['tokens_per_second'] / 1e6:.1f}",
                f"{row['least'] / 1e6:.1f} to {row['greatest'] / 1e6:.1f}",
                f"{two['tokens_per_second'] / 1e6:.1f}",
                f"{row['first_batch']:.2f} s",
                f"{two['first_batch']:.2f} s",
            ]
        )
    head = (
        "tokens a row | packing | places filled | million tokens/s, no workers | least to greatest"
        " | two workers | first batch, no workers | two workers"
    )
    return _table(head, lines)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *(attention, readme, loss, uptraining, train_step, steps, decoding, scaling, slices, data),
    )
}


def main(arguments: list[str]) -> int:
    """Writes the tables; with --check only compares them. Returns the exit status."""
    if arguments not in ([], ["--check"]):
        print(f"{' '.join(arguments)} is given, but only --check is allowed.", file=sys.stderr)
        return 2
    stale = 0
    for path in documents():
        old = path.read_text(encoding="utf-8")
        new = render(old)
        if old != new:
            stale += 1
            print(f"{path.relative_to(ROOT)}: {'differs' if arguments else 'written'}")
            if not arguments:
                path.write_text(new, encoding="utf-8")
    return 1 if arguments and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
