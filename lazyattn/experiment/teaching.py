"""How a model that was taken over is taught to be lazy."""

import dataclasses
from typing import Annotated

from lazyattn.allowed import POSITIVE, SHARE, at_least, check_settings
from lazyattn.errors import require


@dataclasses.dataclass(frozen=True)
class TeachingConfig:
    """What `--init_from` does with a softmax model; by default it is trained as any other.

    Attributes:
      offset_steps: steps in which every offset is brought from 0 to
        `model.attention.offset_init`, evenly; 0: it starts at 0 and is only learned.
      bias_steps: steps in which every slope is brought from 0 to the one that a fresh model
        starts with (ALiBi's), evenly; 0: it starts at none and is only learned.
      slope_share: what the ramp brings slopes to, as a share of those: half of them is spans
        twice as long.
      frozen: only offsets, distance biases and LoRA matrices are trained.
      distill: share of the objective that is the divergence from the softmax model that was
        taken over; the rest is the next token's loss. 0: none.
    """

    offset_steps: Annotated[int, at_least(0)] = 0
    bias_steps: Annotated[int, at_least(0)] = 0
    slope_share: Annotated[float, POSITIVE] = 1.0
    frozen: bool = False
    distill: Annotated[float, SHARE] = 0.0

    def __post_init__(self):
        check_settings(self, "teaching.")
        require(
            self.slope_share == 1 or self.bias_steps > 0,
            "teaching.slope_share",
            self.slope_share,
            "1.0 while teaching.bias_steps is 0, since no slope rises",
        )
