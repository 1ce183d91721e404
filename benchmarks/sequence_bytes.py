"""Counts the keys and values that devices send where they share rows, in the compiled step.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \\
        python -m benchmarks.sequence_bytes --length=65536 --output=FILE.jsonl

The train step of the study's model, default recipe, is compiled for so many simulated devices, all
of which share each row (nothing runs). Its text holds each reach that heads may choose. Which of
them they take follows from the parameters: those at the start and, with --spans, the learned spans
of a run, which `python -m benchmarks.spans --slopes=FILE` keeps. Beside it stands the step that
gathers everything (`skip_mass` 0, whose program is otherwise the same). A line of JSON for each is
printed, and added to --output: bytes that all devices send in a step, and for each group of heads
how many layers take which reach (None: all).
"""

import dataclasses
import json
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Int

from benchmarks import provenance
from benchmarks.study.settings import MODEL
from lazyattn import paths, sharding
from lazyattn.checkpoint.state import StateFactory
from lazyattn.compile import collectives, groups
from lazyattn.compile.hlo import Computation, Instruction, Module
from lazyattn.errors import require
from lazyattn.experiment.training import OptimizerConfig
from lazyattn.model import fetch
from lazyattn.model.config import RECIPES, ModelConfig
from lazyattn.model.distance_bias import bias_arguments, bias_parameters
from lazyattn.model.heads import initial_slopes
from lazyattn.model.objective import make_loss_fn
from lazyattn.model.parameters import init_params, partition_specs
from lazyattn.model.query_key_norm import score_bound
from lazyattn.training.optimizer import make_optimizer, make_schedule
from lazyattn.training.step import make_train_step

FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_OWN: dict[str, Any] = {"flag_values": FLAGS}
_LENGTH = flags.DEFINE_integer("length", 65_536, "Tokens of a row.", lower_bound=2, **_OWN)
_SPANS = paths.define("spans", None, "Learned spans, .npz; None: only those at the start.", **_OWN)
_OUTPUT = paths.define("output", None, "File for a line of JSON; None: only print.", **_OWN)


def compiled(config: ModelConfig, length: int, devices: int) -> Module:
    """Returns the train step of one row that so many devices share."""
    mesh = sharding.make_mesh(
        sharding.MeshConfig(data=1, sequence=devices), jax.devices()[:devices]
    )
    optimizer = make_optimizer(OptimizerConfig(), 2)
    factory = StateFactory(
        lambda key: init_params(config, key), partition_specs(config), optimizer, mesh, 0
    )
    step = make_train_step(
        make_loss_fn(config),
        optimizer,
        make_schedule(OptimizerConfig(), 2),
        mesh=mesh,
        shardings=factory.shardings,
    )
    place = jax.sharding.NamedSharding(mesh, sharding.spec("batch", "length"))
    names = ("inputs", "targets", "segment_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct((1, length), "int32", sharding=place) for name in names}
    return Module.parse(step.lower(factory.abstract, batch).compile().as_text())


def sent(module: Module, computation: str | None = None) -> float:
    """Returns the bytes that all devices send to others together, in collectives of any kind.

    Args:
      module: compiled.
      computation: whose instructions count; None: those of all that runs.
    """
    running = module.running(computation)
    return sum(times * _sent_in(module, part, owner) for part, owner, times in running)


def _sent_in(module: Module, part: Instruction, owner: Computation) -> float:
    kind = collectives.kind_of(part)
    if kind is None:
        return 0.0
    if kind == "collective-permute":
        listed = re.search(r"source_target_pairs=\{(\{.*?\})\}", part.rest)
        assert listed is not None, part
        pairs = re.findall(r"\{(\d+),(\d+)\}", listed[1])
        senders, size = sum(source != target for source, target in pairs), 2
    else:
        assert module.partitions is not None
        senders = module.partitions
        size = len(groups.first_group(part.rest, senders))
    return senders * collectives.wire_bytes(kind, part, owner, size)


def fetched(
    module: Module, chosen: Int[np.ndarray, "layers groups"], number_of_reaches: int
) -> float:
    """Returns the bytes of keys and values, and of their gradients, that a step sends.

    Args:
      module: of `compiled`.
      chosen: which of its reaches each group of heads takes.
      number_of_reaches: that a group has, all keys included.
    """
    total, inside = 0.0, set()
    found = [
        (part, owner, times, int(match[1]))
        for part, owner, times in module.running()
        if (match := re.search(r"\bfetch_(\d+)\b", part.op_name))
    ]
    for part, _, times, group in found:
        if part.opcode == "conditional":
            branches = module.branches(part)
            inside |= {owner.name for name in branches for _, owner, _ in module.running(name)}
            # Parts of a chunk, a loop of hops from chunk to chunk, and all.
            *parts, hop, everything = (sent(module, name) for name in branches)
            hops = [hop * n for n in range(1, number_of_reaches - len(parts))]
            by_reach = [*parts, *hops, everything]
            total += times * float(np.mean([by_reach[choice] for choice in chosen[:, group]]))
    return total + sum(
        times * _sent_in(module, part, owner)
        for part, owner, times, _ in found
        if owner.name not in inside
    )


def at_start(
    config: ModelConfig, fetch_groups: tuple[fetch.Group, ...], length: int
) -> Int[np.ndarray, "layers groups"]:
    """Returns which reaches are taken before the first step."""
    att = config.attention
    learned = {
        name: one.init(jax.random.key(0), one.shape, jnp.float32)
        for name, one in bias_parameters(att).items()
    }
    bias = bias_arguments(learned, att)
    bound = score_bound(config, *(jnp.ones(config.head_dim),) * 2)
    chosen = fetch.choices(
        fetch_groups,
        fetch.Bound(bound, initial_slopes(att)),
        bias["distance_bias"],
        bias["distance_slope"],
        jnp.full(att.num_heads, att.offset_init),
        length=length,
        skip_mass=att.skip_mass / 2,
        head_shards=1,
    )
    return np.broadcast_to(np.asarray(chosen), (config.num_layers, len(fetch_groups)))


def by_spans(
    spans: Int[np.ndarray, "layers heads"], fetch_groups: tuple[fetch.Group, ...]
) -> Int[np.ndarray, "layers groups"]:
    """Returns which reaches are taken with these spans, or nearer ones."""
    by_kv_head = spans.reshape(len(spans), sum(len(group.heads) for group in fetch_groups), -1)
    farthest = by_kv_head.max(axis=2) - 1
    return np.stack(
        [
            np.searchsorted(group.reaches[:-1], farthest[:, group.heads].max(axis=1))
            for group in fetch_groups
        ],
        axis=1,
    )


def main(argv: list[str]) -> None:
    """Compiles, counts, prints and writes."""
    del argv
    start, devices, length = time.perf_counter(), jax.device_count(), _LENGTH.value
    require(
        devices > 1 and length % (2 * devices) == 0,
        "--length",
        length,
        f"a multiple of twice the number of devices, {devices}, which is at least 2",
    )
    attention = dataclasses.replace(MODEL.attention, **RECIPES["sharp_norm"])
    config = dataclasses.replace(MODEL, attention=attention, remat="full")
    slopes = initial_slopes(attention).reshape(1, attention.kv_heads, -1)
    fetch_groups = fetch.by_slope(slopes, length, devices)
    chosen = {"at the start": at_start(config, fetch_groups, length)}
    if _SPANS.value is not None:
        spans = np.load(_SPANS.value)["spans"]
        wanted = (config.num_layers, attention.num_heads)
        require(spans.shape == wanted, "--spans", spans.shape, f"a file with spans of {wanted}")
        chosen["learned"] = by_spans(spans, fetch_groups)
    whole = dataclasses.replace(attention, skip_mass=0.0)
    gathers = compiled(dataclasses.replace(config, attention=whole), length, devices)
    fetches = compiled(config, length, devices)
    everything = fetched(gathers, np.zeros((config.num_layers, 1), int), 1)
    for spans_are, taken in chosen.items():
        found = fetched(fetches, taken, max(len(group.reaches) for group in fetch_groups))
        line = {
            "length": length,
            "devices": devices,
            "spans": spans_are,
            "fetched_bytes": found,
            "gathered_bytes": everything,
            "share": round(found / everything, 4),
            "groups": [
                {"heads": len(group.heads), "layers_by_reach": layers_by_reach(group, own)}
                for group, own in zip(fetch_groups, taken.T, strict=True)
            ],
            "seconds": round(time.perf_counter() - start, 1),
            "jax": jax.__version__,
            **provenance.made_by("benchmarks.sequence_bytes"),
        }
        text = json.dumps(line)
        print(text)
        if _OUTPUT.value:
            with open(_OUTPUT.value, "a") as file:
                file.write(text + "\n")


def layers_by_reach(group: fetch.Group, chosen: Int[np.ndarray, " layers"]) -> dict[str, int]:
    """Returns how many layers take which of a group's reaches."""
    counts = np.bincount(chosen, minlength=len(group.reaches)).tolist()
    return {str(reach): n for reach, n in zip(group.reaches, counts, strict=True) if n}


if __name__ == "__main__":
    app.run(main)
