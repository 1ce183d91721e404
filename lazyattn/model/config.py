"""What a model is: two frozen dataclasses and the named attention recipes."""

import dataclasses
import math
from typing import Annotated, Literal

from lazyattn.allowed import (
    FINITE,
    NON_NEGATIVE,
    POSITIVE,
    SHARE,
    Allowed,
    at_least,
    check_settings,
    one_of,
)
from lazyattn.errors import bad_value, require

# Each variant changes one thing about `lazy`, so that a comparison is one line.
VARIANTS = {
    "lazy": "distance bias and Elastic-Softmax",
    "softmax": "neither bias nor offset: ordinary attention",
    "biased_softmax": "the distance bias without the offset",
    "lazy_no_bias": "Elastic-Softmax without the distance bias",
    "lazy_constant_offset": "threshold tau instead of tau / n",
    "lazy_length_offset": "threshold tau / context length instead of tau / n",
    "lazy_renormalized": "weights divided by their sum after the ReLU",
}


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """One attention layer; the defaults are the `sharp` recipe.

    Attributes:
      variant: a key of `VARIANTS`.
      num_heads: query heads.
      num_kv_heads: key/value heads, a divisor of `num_heads`; None: as many.
      head_dim: size of a head, even; None: model width / num_heads.
      rope: rotate queries and keys by position (half-split layout).
      rope_base: RoPE's base; the authors' code has 10,000.
      rope_scaling: how a model was stretched to longer rows than it was trained on first:
        "none"; "linear": all angles are divided by `rope_factor`; "llama3": slow ones are,
        fast ones not (`lazyattn.rotary.RopeScaling`).
      rope_factor: of the scaling.
      rope_length: of "llama3": tokens a row before it was stretched.
      rope_low, rope_high: of "llama3": pairs that turn less often than `rope_low` times in
        `rope_length` tokens are slow, and more often than `rope_high` times fast.
      qkv_bias: queries, keys and values have a learned bias each, added before `qk_norm` and
        RoPE; not to be mixed up with the distance bias.
      qk_norm: RMS-normalise each query and key head before RoPE.
      bias_kind: how the distance bias is learned. "decay": b(x) = -exp(theta) x +
        delta[min(x, W - 1)] with theta and delta learned, so that it always falls past
        the table. "table": b(x) is a free table, and past it a free slope.
      bias_width: W, distances with a table entry of their own.
      bias_init: of a "table": "alibi" (table[x] = -m x) or "normal" (std `bias_std`).
      bias_std: of a "table": standard deviation of the "normal" initialization.
      bias_tail: of a "table": learn a slope past W; otherwise the bias is zero there.
      global_share: share of the heads that are global: they have no slope (b = delta
        alone, 0 past W) and no window.
      global_rope: rotate the queries and keys of global heads too.
      slope_shards: devices among which slopes are dealt out head by head, so that each has
        equal work even with one or two key/value heads; a divisor of them. 1: heads of a
        key/value head have neighboring slopes, for the smallest cache
        (`lazyattn.model.heads`). Where global heads lie hangs on it too.
      window: local heads see their last `window` keys only; None: all heads see all.
      output_gate: multiply each head's output by sigmoid(x W_g), elementwise, before the
        output projection (arXiv 2505.06708).
      offset_init: initial tau of every head; negative suppresses.
      skip_mass: softmax mass a row may lose to skipped tiles; 0 skips none.
      implementation: a name `lazyattn.lazy_attention` knows; None: the best that
        applies. Decoding with a cache always takes the best that can.
    """

    variant: Annotated[str, one_of(VARIANTS)] = "lazy"
    num_heads: Annotated[int, at_least(1)] = 16
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope: bool = True
    rope_base: Annotated[float, POSITIVE] = 10_000.0
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: Annotated[float, POSITIVE] = 1.0
    rope_length: Annotated[int, at_least(1)] = 8192
    rope_low: Annotated[float, POSITIVE] = 1.0
    rope_high: Annotated[float, POSITIVE] = 4.0
    qkv_bias: bool = False
    qk_norm: bool = False
    bias_kind: Literal["decay", "table"] = "decay"
    bias_width: Annotated[int, at_least(1)] = 1024
    bias_init: Literal["alibi", "normal"] = "alibi"
    bias_std: Annotated[float, NON_NEGATIVE] = 0.02
    bias_tail: bool = True
    global_share: Annotated[float, SHARE] = 0.0
    global_rope: bool = True
    slope_shards: int = 1
    window: Annotated[int | None, at_least(1)] = None
    output_gate: bool = False
    offset_init: Annotated[float, FINITE] = -0.5
    skip_mass: Annotated[float, Allowed(lambda x: 0 <= x < 1, "at least 0 and below 1")] = 1e-6
    implementation: str | None = None

    def __post_init__(self):
        where = "model.attention."
        check_settings(self, where)
        require(
            self.kv_heads >= 1 and self.num_heads % self.kv_heads == 0,
            where + "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads = {self.num_heads}",
        )
        if self.bias_kind == "decay":
            for name in ("bias_init", "bias_std", "bias_tail"):
                default = type(self).__dataclass_fields__[name].default
                require(
                    getattr(self, name) == default,
                    where + name,
                    getattr(self, name),
                    f"left at {default!r} while {where}bias_kind is 'decay': it is a setting of"
                    " bias_kind 'table' alone",
                )
        if self.rope_scaling == "none":
            for name in ("rope_factor", "rope_length", "rope_low", "rope_high"):
                default = type(self).__dataclass_fields__[name].default
                require(
                    getattr(self, name) == default,
                    where + name,
                    getattr(self, name),
                    f"left at {default!r} while {where}rope_scaling is 'none'",
                )
        require(
            self.rope_high > self.rope_low,
            where + "rope_high",
            self.rope_high,
            f"above {where}rope_low = {self.rope_low:g}",
        )
        self._check_global_heads(where)

    def _check_global_heads(self, where: str) -> None:
        share, name = self.global_share, where + "global_share"
        require(
            math.isclose(share * self.num_heads, self.num_global_heads, abs_tol=1e-6),
            name,
            share,
            f"a whole number of the {self.num_heads} heads",
        )
        require(
            self.global_rope or self.num_global_heads > 0,
            where + "global_rope",
            self.global_rope,
            f"True while {where}global_share is 0, since there are no global heads"
            f" ({where}rope is for all heads)",
        )
        require(
            self.slope_shards >= 1 and self.kv_heads % self.slope_shards == 0,
            where + "slope_shards",
            self.slope_shards,
            f"a divisor of the {self.kv_heads} key/value heads",
        )
        group = self.num_heads // self.kv_heads
        if self.by_group and self.num_global_heads % group:
            setting = "window is set" if self.window is not None else "global_rope is False"
            raise bad_value(
                name,
                share,
                f"a share of the {self.kv_heads} key/value heads while {where}{setting}, since"
                f" query heads of a key/value head then differ: {self.num_global_heads} global"
                f" heads are no whole number of groups of {group}",
            )

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def num_global_heads(self) -> int:
        """Query heads without a slope and without a window."""
        return round(self.global_share * self.num_heads)

    @property
    def by_group(self) -> bool:
        """Whether global heads see other keys than local ones: then groups are one or the other."""
        return self.num_global_heads > 0 and (self.window is not None or not self.global_rope)

    @property
    def has_bias(self) -> bool:
        """Whether the variant learns a distance bias."""
        return self.variant not in ("softmax", "lazy_no_bias")

    @property
    def has_tail(self) -> bool:
        """Whether the bias is learned at every distance, not 0 past its table."""
        return self.has_bias and (self.bias_kind == "decay" or self.bias_tail)

    @property
    def has_offset(self) -> bool:
        """Whether the variant learns an offset."""
        return self.variant not in ("softmax", "biased_softmax")


# What separates the recipes; docs/results.md says why `sharp_norm` is the default of configs.
# Each names all that any of them changes, so that the last of several joined by "+" is what comes
# out.
RECIPES = {
    "paper": {
        "bias_kind": "table",
        "bias_init": "normal",
        "bias_tail": False,
        "offset_init": -1.0,
        "qk_norm": False,
    },
    "sharp": {
        "bias_kind": "decay",
        "bias_init": "alibi",
        "bias_tail": True,
        "offset_init": -0.5,
        "qk_norm": False,
    },
    # What the study's rule chose.
    "sharp_norm": {
        "bias_kind": "decay",
        "bias_init": "alibi",
        "bias_tail": True,
        "offset_init": -0.5,
        "qk_norm": True,
    },
    # `sharp` before it was a decay: kept for comparison, and to go on with old runs.
    "sharp_table": {
        "bias_kind": "table",
        "bias_init": "alibi",
        "bias_tail": True,
        "offset_init": -0.5,
        "qk_norm": False,
    },
}


# `ModelConfig.remat`; of `AUTO` whoever trains makes another.
Remat = Literal["none", "dots", "attention", "full", "auto"]
AUTO: Remat = "auto"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
      vocab_size: rows of the embedding.
      width: size of the residual stream.
      num_layers: blocks.
      mlp_width: hidden size of SwiGLU; None: 8/3 width rounded up to 256.
      norm_eps: RMSNorm's epsilon.
      tie_embeddings: use the embedding as the output projection too.
      scale_embedding: multiply embeddings by width^1/2 on the way in; False for models that
        were trained without it, as most of others were.
      compute_dtype: dtype of activations, "float32" or "bfloat16"; parameters,
        norms, logits and the loss are float32.
      remat: what the backward pass recomputes: "none" (nothing), "dots" (all but
        matrix products and attention), "attention" (all but attention), "full" (each
        block), "auto" (as little as fits; the trainer chooses, and what else calls the
        model recomputes nothing).
      scan_layers: compile one block and scan over it.
      loss_chunk: positions whose logits a device holds at once in the loss; None: so many that
        the gradient of the output embedding, read and written for each chunk, is little beside
        the logits, and these are 1 GiB at most.
      lora_rank: of the changes that all matrices of the blocks get while they are frozen
        (`lazyattn.model.lora`); 0: none. What is exported has them merged.
      lora_alpha: what they are multiplied with, times the rank.
      attention: the attention layer.
    """

    vocab_size: Annotated[int, at_least(1)] = 32_000
    width: Annotated[int, at_least(1)] = 1024
    num_layers: Annotated[int, at_least(1)] = 24
    mlp_width: Annotated[int | None, at_least(1)] = None
    norm_eps: Annotated[float, Allowed(lambda x: x > 0, "positive")] = 1e-6
    tie_embeddings: bool = False
    scale_embedding: bool = True
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Remat = "none"
    scan_layers: bool = True
    loss_chunk: Annotated[int | None, at_least(1)] = None
    lora_rank: Annotated[int, at_least(0)] = 0
    lora_alpha: Annotated[float, POSITIVE] = 16.0
    attention: AttentionConfig = AttentionConfig()

    def __post_init__(self):
        check_settings(self, "model.")
        if self.attention.head_dim is None:
            require(
                self.width % self.attention.num_heads == 0,
                "model.width",
                self.width,
                f"a multiple of model.attention.num_heads = {self.attention.num_heads}"
                " while model.attention.head_dim is None",
            )
        require(
            self.head_dim >= 2 and self.head_dim % 2 == 0,
            "the head size (model.attention.head_dim, or width / num_heads)",
            self.head_dim,
            "even, since RoPE rotates pairs",
        )

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        if self.attention.head_dim is not None:
            return self.attention.head_dim
        return self.width // self.attention.num_heads

    @property
    def embedding_factor(self) -> float:
        """What embeddings are multiplied by on the way in."""
        return self.width**0.5 if self.scale_embedding else 1.0

    @property
    def loss_positions(self) -> int:
        """Positions whose logits a device holds at once in the loss."""
        if self.loss_chunk is not None:
            return self.loss_chunk
        # A logit is about 22 bytes of traffic, an entry of the gradient 8 for each chunk.
        return max(1, min(8 * self.width, 2**28 // self.vocab_size))

    @property
    def hidden_width(self) -> int:
        """Hidden size of SwiGLU."""
        if self.mlp_width is not None:
            return self.mlp_width
        return -(-8 * self.width // (3 * 256)) * 256
