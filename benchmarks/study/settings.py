"""The settings of one run: the study's model and optimizer, a variant's changes, a trial's."""

import ast
import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks.study.variants import VARIANTS
from lazyattn.data.config import DataConfig
from lazyattn.errors import bad_value, require
from lazyattn.experiment import ExperimentConfig, check_override, from_config_dict
from lazyattn.experiment.training import OptimizerConfig
from lazyattn.model.config import AttentionConfig, ModelConfig

# 46M parameters: 37M in the blocks, 8.4M in the embedding, which is the output's as well.
MODEL = ModelConfig(
    vocab_size=16_384,
    width=512,
    num_layers=12,
    mlp_width=1344,  # 8/3 of the width, in whole tiles of 64
    tie_embeddings=True,
    loss_chunk=8192,
    attention=AttentionConfig(num_heads=8),
)
WARMUP = 0.05  # of the steps
BATCH, LENGTH = 16, 4096


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is asked of one run.

    Attributes:
      variant: a key of `VARIANTS`.
      seed: of the parameters and of the order of the rows.
      tokens: to train on; whole steps are taken, the nearest number.
      learning_rate: peak.
      log_slope_factor: of the learning rate of the slopes' logarithms; None: the default.
      batch, length: rows of a step and tokens of a row.
      overrides: further settings, (dotted name, text).
    """

    variant: str
    seed: int
    tokens: int
    learning_rate: float
    log_slope_factor: float | None = None
    batch: int = BATCH
    length: int = LENGTH
    overrides: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        require(
            self.variant in VARIANTS, "--variants", self.variant, "one of " + ", ".join(VARIANTS)
        )
        require(self.seed >= 0, "--seeds", self.seed, "at least 0")
        require(self.batch >= 1, "--batch", self.batch, "at least 1")
        require(self.length >= 2, "--length", self.length, "at least 2")
        step = self.batch * self.length
        require(self.tokens >= step, "--tokens", self.tokens, f"at least {step}, those of a step")

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return round(self.tokens / (self.batch * self.length))

    @property
    def label(self) -> str:
        """Names the run in a few words."""
        return f"{self.variant}, seed {self.seed}, lr {self.learning_rate:g}"

    @property
    def identity(self) -> str:
        """Names what is trained: a run of the same identity need not be made twice."""
        parts = [
            self.variant,
            f"seed={self.seed}",
            f"tokens={self.tokens}",
            f"learning_rate={self.learning_rate:g}",
            f"batch={self.batch}x{self.length}",
        ]
        if self.log_slope_factor is not None:
            parts.append(f"log_slope_factor={self.log_slope_factor:g}")
        return " ".join([*parts, *(f"{name}={text}" for name, text in sorted(self.overrides))])


def experiment_of(spec: Spec) -> ExperimentConfig:
    """Returns the run's settings.

    Raises:
      InputError: for a setting that this version doesn't know, or a bad value.
    """
    steps = spec.steps
    base = ExperimentConfig(
        model=MODEL,
        data=DataConfig(batch_size=spec.batch, sequence_length=spec.length),
        optimizer=OptimizerConfig(
            learning_rate=spec.learning_rate,
            schedule="cosine",
            warmup_steps=max(1, round(WARMUP * steps)),
            weight_decay=0.1,
        ),
    ).to_dict()
    _set(base, "training.steps", steps)
    _set(base, "training.seed", spec.seed)
    for name, value in VARIANTS[spec.variant].items():
        _set(base, name, value)
    if spec.log_slope_factor is not None:
        _set(base, "optimizer.log_slope_factor", float(spec.log_slope_factor))
    for name, text in spec.overrides:
        check_override(name, text)
        _set(base, name, read_value(text))
    base["data"]["vocab_size"] = max(260, base["model"]["vocab_size"])
    return from_config_dict(base)


def parse_overrides(texts: Sequence[str], flag: str = "--set") -> tuple[tuple[str, str], ...]:
    """Returns ("model.remat=dots", ...) as pairs; `flag` is where they were given.

    Raises:
      InputError: for one that has no "=".
    """
    pairs = []
    for text in texts:
        name, sign, value = text.partition("=")
        if not (name and sign):
            raise bad_value(flag, text, "like model.remat=dots")
        pairs.append((name, value))
    return tuple(pairs)


def read_value(text: str) -> Any:
    """Returns what a setting's text means: a bool, a number, None, a tuple or the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    *groups, leaf = name.split(".")
    for group in groups:
        tree = tree[group]
    tree[leaf] = value
