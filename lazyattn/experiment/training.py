"""What a training run is, besides its model and its data."""

import dataclasses
from typing import Annotated, Literal

from lazyattn.allowed import (
    BELOW_ONE,
    NON_NEGATIVE,
    POSITIVE,
    SHARE,
    at_least,
    check_settings,
)
from lazyattn.errors import require
from lazyattn.paths import ANYWHERE


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule.

    Attributes:
      name: "adamw", or "muon": Muon on the matrices of the blocks, AdamW on the rest.
      learning_rate: peak of the schedule.
      log_slope_factor: learning rate of the logarithm of a head's slope
        (`distance_log_slope`), as a multiple of the common one; 0: it stays.
      schedule: "cosine", "wsd" (warm-up, stable, linear decay) or "constant"; all
        start with a linear warm-up.
      warmup_steps: steps of the warm-up.
      decay_fraction: share of the steps that "wsd" spends decaying.
      final_fraction: learning rate at the end, as a share of the peak.
      b1, b2, eps: Adam's.
      weight_decay: decoupled, on matrices only; never on norms, distance biases,
        slopes or offsets.
      clip_norm: largest global norm of the gradient; 0: no clipping.
      mu_dtype, nu_dtype: of the first moment (Muon's, too) and of Adam's second, "float32"
        or "bfloat16".
      muon_beta: decay of Muon's momentum, optax's `beta`; it is Nesterov's.
      ns_steps: Newton-Schulz iterations of Muon.
      consistent_rms: Muon's updates have this root mean square, about that of AdamW's
        (Liu et al., arXiv 2502.16982), so they share its learning rate; 0: a matrix of n inputs
        and m outputs has sqrt(max(1, m / n)) times the orthogonal matrix, as in the original.
      ema_decay: of an exponential moving average of the parameters; 0: none. It begins at
        the first parameters, and update n decays it by (1 + n) / (10 + n) at most.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: Annotated[float, POSITIVE] = 1e-3
    log_slope_factor: Annotated[float, NON_NEGATIVE] = 1.0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Annotated[int, at_least(0)] = 1024
    decay_fraction: Annotated[float, SHARE] = 0.2
    final_fraction: Annotated[float, SHARE] = 0.1
    b1: Annotated[float, BELOW_ONE] = 0.9
    b2: Annotated[float, BELOW_ONE] = 0.95
    eps: Annotated[float, POSITIVE] = 1e-15
    weight_decay: Annotated[float, at_least(0)] = 0.1
    clip_norm: Annotated[float, at_least(0)] = 1.0
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    nu_dtype: Literal["float32", "bfloat16"] = "float32"
    muon_beta: Annotated[float, BELOW_ONE] = 0.95
    ns_steps: Annotated[int, at_least(1)] = 5
    consistent_rms: Annotated[float, at_least(0)] = 0.2
    ema_decay: Annotated[float, BELOW_ONE] = 0.0

    def __post_init__(self):
        check_settings(self, "optimizer.")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Steps, seeds, logs and checkpoints.

    Attributes:
      steps: optimizer steps in all.
      seed: seed of the parameters.
      init_from: folder of a run, of one of its checkpoints or of an export whose weights
        the run starts from (`--init_from`); None: fresh ones. A resumed run need not name it.
      microbatches: parts a batch is split into, gradients accumulated exactly.
      quantization: of the step's products with matrices of the blocks, forward and backward:
        "none": in the compute dtype; "fp8": in float8 (`lazyattn.model.fp8`), on NVIDIA GPUs of
        compute capability 8.9 or more, and slowly on CPUs. All else that reads the model
        multiplies in the compute dtype: validation, samples, evaluation, exports.
      z_loss: weight of log(Z)^2 in the loss.
      max_nonfinite_steps: steps in a row with a non-finite loss or gradient that
        are skipped before the run stops.
      log_every: steps between lines on the terminal.
      eval_every: steps between validations; 0: only at the end. Of the checkpoints whose
        step was validated the best is kept, so let it divide `checkpoint_every`.
      eval_batches: first batches of the split that a validation takes; 0: the whole
        split, as `--mode=eval` always does.
      inspect_every: steps between measurements of attention (zeros, mass, sink, offsets)
        on a few validation rows; 0: none.
      sample_every: steps between samples, which are printed and written to `samples.jsonl`;
        0: none.
      sample_prompt: what a sample continues; an empty text asks for a document from its start.
      sample_tokens: tokens of a sample, at most.
      tasks_every: steps between measurements of `tasks`; 0: none.
      tasks: tasks of lm-evaluation-harness with commas between them, as in `--tasks`.
      tasks_dir: folder of their items, as in `--tasks_dir`; None: the harness fetches them.
      tasks_limit: items of each task that are measured, its first; 0: all.
      checkpoint_every: steps between checkpoints; the last step always has one.
      max_failed_saves: checkpoints in a row that can't be written (a full disk) before the
        run stops; 1: it stops at the first, noticed when the next is due.
      keep: newest checkpoints kept, besides the one with the lowest validation loss.
      keep_every: checkpoints at multiples of this are kept for good; 0: none.
      use_ema: validate, sample, evaluate and export the average of the parameters, where
        `optimizer.ema_decay` keeps one.
    """

    steps: Annotated[int, at_least(1)] = 20_480
    seed: int = 0
    init_from: Annotated[str, ANYWHERE] | None = None
    microbatches: Annotated[int, at_least(1)] = 1
    quantization: Literal["none", "fp8"] = "none"
    z_loss: Annotated[float, at_least(0)] = 0.0
    max_nonfinite_steps: Annotated[int, at_least(1)] = 10
    log_every: Annotated[int, at_least(1)] = 10
    eval_every: Annotated[int, at_least(0)] = 0
    eval_batches: Annotated[int, at_least(0)] = 0
    inspect_every: Annotated[int, at_least(0)] = 0
    sample_every: Annotated[int, at_least(0)] = 0
    sample_prompt: str = "The "
    sample_tokens: Annotated[int, at_least(1)] = 60
    tasks_every: Annotated[int, at_least(0)] = 0
    tasks: str = ""
    tasks_dir: Annotated[str, ANYWHERE] | None = None
    tasks_limit: Annotated[int, at_least(0)] = 100
    checkpoint_every: Annotated[int, at_least(1)] = 100
    max_failed_saves: Annotated[int, at_least(1)] = 3
    keep: Annotated[int, at_least(1)] = 3
    keep_every: Annotated[int, at_least(0)] = 0
    use_ema: bool = True

    def __post_init__(self):
        check_settings(self, "training.")
        require(
            not self.tasks_every or self.task_names != (),
            "training.tasks",
            self.tasks,
            "names of tasks with commas between them, where training.tasks_every is not 0",
        )

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names in `tasks`."""
        return tuple(name.strip() for name in self.tasks.split(",") if name.strip())
