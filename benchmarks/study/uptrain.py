"""`python -m benchmarks.study uptrain`: softmax runs of the study are taught to be lazy.

Each run starts from the weights of a softmax run that `run --keep --workdir=DIR` left behind, with
a fresh optimizer and rows that it has not seen. The variant `softmax` is the control: itself,
trained as long. Lazy variants start with offsets and slopes of 0, the same function, and a ramp
brings both to where a fresh model starts (`lazyattn.training.teaching`).
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.study import data, measures, options
from benchmarks.study.ledger import short_name
from benchmarks.study.programs import Programs
from benchmarks.study.run import Options, Study
from benchmarks.study.settings import Spec, experiment_of
from benchmarks.study.taught import BASE
from lazyattn.checkpoint.state import TrainState
from lazyattn.errors import require
from lazyattn.experiment import ExperimentConfig
from lazyattn.training.initialize import find_weights


@dataclasses.dataclass(frozen=True)
class UptrainOptions(Options):
    """What the command line asks for; `tokens` is the largest of `counts`.

    Attributes:
      kept: `--workdir` of the softmax runs.
      kept_tokens, kept_rate: of these.
      counts: tokens to teach with; each is a run.
      ramps: shares of the steps in which offsets and slopes come to their values.
    """

    kept: Path = Path()
    kept_tokens: int = 100_000_000
    kept_rate: float = 2e-3
    counts: tuple[int, ...] = ()
    ramps: tuple[float, ...] = (0.5,)

    def specs(self) -> list[Spec]:
        """Returns the runs in their order: seeds first, so that little is waited for."""
        found = []
        for count, variant, ramp, rate, seed in itertools.product(
            self.counts, self.variants, self.ramps, self.learning_rates, self.seeds
        ):
            shape = self.batch, self.length
            factor = self.log_slope_factors[0]
            spec = Spec(variant, seed, count, rate, factor, *shape, self.overrides)
            attention = experiment_of(spec).model.attention
            steps = str(max(round(ramp * spec.steps), 1 if ramp else 0))
            more = [
                (f"teaching.{name}_steps", steps)
                for name, has in (("offset", attention.has_offset), ("bias", attention.has_bias))
                if has
            ]
            if more or ramp == self.ramps[0]:  # without either there is no ramp to vary
                overrides = (*self.overrides, *more)
                found.append(dataclasses.replace(spec, overrides=overrides))
        return found

    def base(self, seed: int) -> Spec:
        """Returns the softmax run that runs of a seed start from."""
        shape = self.batch, self.length
        own = tuple((key, text) for key, text in self.overrides if not key.startswith("teaching."))
        return Spec(BASE, seed, self.kept_tokens, self.kept_rate, None, *shape, own)

    def folder(self, seed: int) -> Path:
        """Returns its folder."""
        return self.kept / short_name(self.base(seed).identity)


class Uptraining(Study):
    """A study whose runs start from the weights of others."""

    _options: UptrainOptions

    def _head(self, spec: Spec) -> dict[str, Any]:
        attention = self._experiments[spec.identity].teaching
        return super()._head(spec) | {
            "base": self._options.base(spec.seed).identity,
            "ramp_steps": max(attention.offset_steps, attention.bias_steps),
        }

    def _order(self, experiment: ExperimentConfig) -> data.Order:
        before = self._options.base(experiment.training.seed).steps
        return later_rows(self.tokens.train.size, experiment, before)

    def _start(
        self, spec: Spec, programs: Programs, line: dict[str, Any]
    ) -> Callable[[TrainState], TrainState]:
        experiment = self._experiments[spec.identity]
        where = str(self._options.folder(spec.seed))
        training = dataclasses.replace(experiment.training, init_from=where)

        def start(state: TrainState) -> TrainState:
            from_there = dataclasses.replace(experiment, training=training)
            params = (
                find_weights(from_there).read(self._mesh, programs.factory.shardings.params).params
            )
            # The base itself is measured once, in full; of others the loss says they are the same.
            whole = spec.variant == BASE and spec.tokens == min(self._options.counts)
            line["before"] = measures.measure(programs, params, self._found, whole)
            return dataclasses.replace(state, params=params)

        return start


def later_rows(tokens: int, experiment: ExperimentConfig, before: int) -> data.Order:
    """Returns the rows that come after those of the first `before` steps."""
    training, batch = experiment.training, experiment.data.batch_size
    steps = before + training.steps
    found = data.order(tokens, experiment.data.sequence_length, steps, batch, training.seed)
    return data.Order(found.starts[before:], found.epochs)


def define(values: flags.FlagValues) -> None:
    """Defines what `uptrain` has besides the flags of `run`."""
    where: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("kept", None, "--workdir of softmax runs with --keep.", **where)
    flags.DEFINE_string("kept_tokens", "100e6", "Tokens of these runs.", **where)
    flags.DEFINE_float("kept_rate", 2e-3, "Learning rate of these runs.", **where)
    flags.DEFINE_string(
        "ramp", "0.5", "Share of the steps in which offsets and slopes rise; a list.", **where
    )
    values.set_default("tokens", "2e6,5e6,10e6")
    values.set_default("learning_rate", "1e-3")
    values.set_default("variants", "softmax,sharp_steady")
    values.set_default("output", "benchmarks/results/uptraining.jsonl")


def read(values: flags.FlagValues, elapsed: Callable[[], float]) -> UptrainOptions:
    """Returns what the flags ask for.

    Raises:
      InputError: for a bad value, or a softmax run that is not there.
    """
    counts = tuple(options.whole("--tokens", text) for text in values.tokens.split(","))
    ramps = options.numbers("--ramp", values.ramp, float)
    for ramp in ramps:
        require(0 <= ramp <= 1, "--ramp", ramp, "from 0 to 1")
    require(values.kept is not None, "--kept", values.kept, "the --workdir of softmax runs")
    values.tokens = str(max(counts))
    plain = options.read(values, elapsed)
    found = UptrainOptions(
        **{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)},
        kept=Path(values.kept).expanduser(),
        kept_tokens=options.whole("--kept_tokens", values.kept_tokens),
        kept_rate=values.kept_rate,
        counts=counts,
        ramps=ramps,
    )
    for seed in found.seeds:
        folder = found.folder(seed) / "checkpoints"
        require(
            folder.is_dir(),
            "--kept",
            values.kept,
            f"a folder that has {folder.parent.name}, which is {found.base(seed).identity!r}",
        )
    return found
