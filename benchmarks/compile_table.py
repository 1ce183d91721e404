"""The recipes' train steps compiled for slices from 16 to 512 chips.

    python -m benchmarks.compile_table --output=FILE

Every row is `train.py --mode=compile` with the settings it names. Where a step does not
fit, microbatches are doubled down to one row a device, and then tensor, until it does.
FILE keeps the rows as JSON lines; rows that it has are not compiled again.
`python -m benchmarks.tables` writes the table of docs/pods.md from them.
"""

import dataclasses
import itertools
import json
import pathlib
from typing import Any

import jax
from absl import app, flags

from lazyattn import paths, recipes
from lazyattn.compile import topology
from lazyattn.compile.main import examine
from lazyattn.compile.report import Report
from lazyattn.experiment import ExperimentConfig, from_config_dict
from lazyattn.sharding import MeshConfig

SLICES = {
    "v5e": {16: "4x4", 64: "8x8", 128: "8x16", 256: "16x16", 512: "16x16"},
    "v5p": {16: "2x2x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"},
    "v6e": {16: "4x4", 64: "8x8", 128: "8x16", 256: "16x16", 512: "16x16"},
    "h100": {chips: str(chips) for chips in (16, 64, 128, 256, 512)},
}
RUNS = {
    "lazy_340m_10b": (16, 128),
    "lazy_760m_100b": (16, 128),
    "lazy_1300m_100b": (128, 16),
    "lazy_7b_100b": (256, 64),
    "lazy_70b_100b": (512, 256),
}
# A parameter's rows a device: below this XLA pads a gather to whole tiles.
_TILE = 128


def main(argv: list[str]) -> None:
    del argv
    options = flags.FLAGS
    path = pathlib.Path(options.output)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["config"], row["topology"]) for row in rows}
    jax.config.update("jax_platforms", "cpu")
    for place in range(2):  # one row of each model and chip first
        for chip, config in itertools.product(options.chips, options.configs):
            chips = RUNS[config][place]
            where = slice_of(chip, chips)
            if (config, str(where)) in done:
                continue
            row = {"config": config, "topology": str(where), "chips": chips}
            row |= try_out(config, where)
            rows.append(row)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(line(row), flush=True)
    print("\n".join(table(in_order(rows))))


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows by kind of chip, model and number of chips."""

    def place(row: dict[str, Any]) -> tuple[int, int, int]:
        chip = row["topology"].split("*")[-1].split(":")[0]
        return list(SLICES).index(chip), list(RUNS).index(row["config"]), row["chips"]

    return sorted(rows, key=place)


def slice_of(chip: str, chips: int) -> topology.Topology:
    """Returns the slice, or slices where a pod has fewer chips."""
    slices = 2 if chips == 512 and chip in ("v5e", "v6e") else 1
    prefix = f"{slices}*" if slices > 1 else ""
    return topology.parse(f"{prefix}{chip}:{SLICES[chip][chips]}")


def try_out(config: str, where: topology.Topology) -> dict[str, Any]:
    """Returns the first row of settings that fit, or the last tried."""
    experiment = from_config_dict(recipes.run(config))
    fsdp = 1
    while fsdp < where.devices // where.slices and 2 * fsdp * _TILE <= experiment.model.width:
        fsdp *= 2
    tensor = parts = 1
    tried = 0
    while True:
        data = where.devices // fsdp // tensor
        report = examine(_with(experiment, data, fsdp, tensor, parts), where)
        tried += 1
        rows = experiment.data.batch_size // (data * fsdp)
        if report.fits or tensor == experiment.model.attention.kv_heads:
            return _row(report, tried)
        if parts < rows:
            parts *= 2
        else:
            tensor, parts = 2 * tensor, 1
            # One more axis costs more than one more part, so keep what is split by rows.
            parts = max(experiment.data.batch_size // (where.devices // tensor) // 2, 1)


def _with(
    experiment: ExperimentConfig, data: int, fsdp: int, tensor: int, parts: int
) -> ExperimentConfig:
    return dataclasses.replace(
        experiment,
        mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
        training=dataclasses.replace(experiment.training, microbatches=parts),
    )


def _row(report: Report, tried: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "mesh": {axis: size for axis, size in report.mesh.items() if size > 1},
        "microbatches": report.microbatches,
        "fits": report.fits,
        "state": report.state.parameters + report.state.optimizer,
        "temporaries": report.temporaries,
        "needed": report.needed,
        "available": report.available,
        "seconds": report.seconds,
        "tried": tried,
    }
    if report.traffic is not None:
        roof = report.traffic.roofline
        row |= {
            "flops": report.traffic.weight_flops + report.traffic.attention_flops,
            "hbm": report.traffic.hbm_bytes,
            "sent": {
                axis: sum(c.wire_bytes for c in report.traffic.collectives if c.axes == axis)
                for axis in roof.network
            },
            "between": sum(c.wire_bytes for c in report.traffic.collectives if c.between),
            "unread": report.traffic.unread,
            "gathers": sum(c.wire_bytes for c in report.traffic.collectives if c.gathers),
            "compute": roof.compute,
            "memory": roof.memory,
            "network": sum(roof.network.values()),
            "step": [roof.overlapped, roof.serial],
            "mfu": [roof.mfu(roof.overlapped), roof.mfu(roof.serial)],
        }
    return row


HEAD = (
    "| model | chips | mesh, microbatches | GB a device: parameters and optimizer + temporaries"
    ", of its memory | TFLOP | HBM GB"
    " | sent GB | compute / HBM / network ms | step ms | MFU | compiled in |"
)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Returns all rows as Markdown."""
    return [HEAD, "|---|" + "---|" * (HEAD.count("|") - 2), *(line(row) for row in rows)]


def line(row: dict[str, Any]) -> str:
    """Returns a row as Markdown."""
    mesh = " ".join(f"{axis} {size}" for axis, size in row["mesh"].items())
    cells = [
        row["config"].split("_")[1],
        row["topology"],
        f"{mesh}, {row['microbatches']}",
        f"{row['state'] / 1e9:.1f} + {(row['needed'] - row['state']) / 1e9:.1f}"
        f" of {row['available'] / 1e9:.0f}" + ("" if row["fits"] else ": does not fit"),
    ]
    if "flops" in row:
        sent = ", ".join(
            f"{axis} {size / 1e9:.1f}" for axis, size in row["sent"].items() if size > 5e7
        )
        if row["between"] > 5e7:
            sent += f"; {row['between'] / 1e9:.1f} of it between slices"
        if row["unread"]:
            sent += "; more that is not read"
        cells += [
            f"{row['flops'] / 1e12:.0f}",
            f"{row['hbm'] / 1e9:.0f}",
            sent or "0",
            " / ".join(f"{1e3 * row[name]:.0f}" for name in ("compute", "memory", "network")),
            " to ".join(f"{1e3 * seconds:.0f}" for seconds in row["step"]),
            " to ".join(f"{100 * share:.0f}%" for share in row["mfu"]),
        ]
    else:
        cells += [""] * 6
    cells.append("by formula" if row["seconds"] is None else f"{row['seconds']:.0f} s")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    paths.define("output", None, "Where rows are kept.", required=True)
    flags.DEFINE_list("chips", list(SLICES), "Kinds of chips.")
    flags.DEFINE_list("configs", list(RUNS), "Recipes.")
    app.run(main)
