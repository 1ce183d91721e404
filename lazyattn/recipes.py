"""The base of every recipe on FineWeb-Edu: one run by its size, its tokens and its attention.

Each number has its source behind it:
  paper     arXiv 2601.00919 (the mechanism, data, context and parameter counts)
  trainer   flame and flash-linear-attention, the common trainer of such models, whose
            settings for them are published (configs/transformer_*.json, README)
  ours      our choice, where neither says anything or both leave it to the machine
"""

import dataclasses

import ml_collections

from lazyattn.errors import require
from lazyattn.experiment import defaults, with_attention


@dataclasses.dataclass(frozen=True)
class Size:
    """A model's shape. Head size is width / heads; SwiGLU is 8/3 wide unless given.

    Attributes:
      parameters: what its name says, with the vocabulary counted once: the embedding
        but not the unembedding, as the trainer's names do.
      width, layers, heads: of the transformer.
      kv_heads: key/value heads; None: as many as heads.
      mlp_width: of SwiGLU; None: 8/3 width, rounded up to 256.
      learning_rate: peak.
      tokens_per_step: of a batch.
      remat: what the backward pass recomputes.
    """

    parameters: float
    width: int
    layers: int
    heads: int
    kv_heads: int | None = None
    mlp_width: int | None = None
    learning_rate: float = 1e-3
    tokens_per_step: int = 524_288  # trainer: 8 devices of 65,536 tokens
    remat: str = "full"


SIZES = {
    # trainer: width 1024, 24 layers, 16 heads, lr 1e-3. ours: remat.
    "340m": Size(340e6, 1024, 24, 16),
    # paper: the count. ours: the shape. Width 1536 is that of GPT-3's 760M (Brown et
    # al., arXiv 2005.14165, table 2.1); 25 layers and heads of 64 make 758M with this
    # vocabulary.
    "760m": Size(760e6, 1536, 25, 24),
    # trainer: the shape, transformer_1B. ours: lr as for the smaller ones.
    "1300m": Size(1.3e9, 2048, 24, 32),
    # trainer: the shape, transformer_7B. ours: lr and tokens a step, which are those of
    # LLaMA 7B (Touvron et al., arXiv 2302.13971, table 2).
    "7b": Size(7e9, 4096, 32, 32, 8, 14_336, learning_rate=3e-4, tokens_per_step=2**22),
    # ours: shape, lr and tokens a step, which are those of Llama 2 70B (Touvron et al.,
    # arXiv 2307.09288, table 1 and section 2).
    "70b": Size(70e9, 8192, 80, 64, 8, 28_672, learning_rate=1.5e-4, tokens_per_step=2**22),
}

# The data's name -> tokens of a run. trainer: 20,480 steps of 524,288 for 10B. ours: ten
# times as many for 100B.
TOKENS = {"10b": 20_480 * 524_288, "100b": 204_800 * 524_288}

# Name -> size, tokens, attention and tokens a row.
RUNS = {
    "lazy_340m_10b": ("340m", "10b", "sharp_norm", 4096),
    "lazy_760m_100b": ("760m", "100b", "sharp_norm", 4096),
    "paper_340m_10b": ("340m", "10b", "paper", 4096),
    "paper_760m_100b": ("760m", "100b", "paper", 4096),
    "softmax_340m_10b": ("340m", "10b", "softmax", 4096),
    "softmax_760m_100b": ("760m", "100b", "softmax", 4096),
    # Ours, not the paper's.
    "lazy_1300m_100b": ("1300m", "100b", "sharp_norm", 4096),
    "lazy_7b_100b": ("7b", "100b", "sharp_norm", 4096),
    "lazy_70b_100b": ("70b", "100b", "sharp_norm", 4096),
    # To be evaluated at 1024 and 2048. The paper's bias table is wider than these rows, so
    # that what it holds past 512 is never trained; with `sharp_norm` a slope is learned.
    "length_extrapolation_512": ("340m", "10b", "paper", 512),
}

# Name -> what it changes of the attention.
ABLATIONS: dict[str, dict[str, str | float | bool]] = {
    "constant_offset": {"variant": "lazy_constant_offset"},  # tau, not tau / n
    "length_offset": {"variant": "lazy_length_offset"},  # tau over the context length
    "renormalized": {"variant": "lazy_renormalized"},  # divided by their sum after the ReLU
    "no_bias": {"variant": "lazy_no_bias"},
    "no_offset": {"variant": "biased_softmax"},
    "softmax": {"variant": "softmax"},
    "no_rope": {"rope": False},  # the distance bias alone tells where a key is
    "offset_init_half": {"offset_init": -0.5},  # the authors' training branch
    "alibi_bias": {"bias_kind": "table", "bias_init": "alibi", "bias_tail": True},
}


def run(name: str) -> ml_collections.ConfigDict:
    """Returns the settings of a run.

    Args:
      name: a key of `RUNS`, such as "lazy_340m_10b"; behind a plus an attention in place of
        its own, as in `lazyattn.experiment.with_attention`.

    Raises:
      InputError: for an unknown name.
    """
    name, _, attention = name.partition("+")
    require(name in RUNS, "the run", name, "one of " + ", ".join(RUNS))
    size, tokens, own, length = RUNS[name]
    return recipe(size, tokens, attention or own, sequence_length=length)


def ablation(name: str) -> ml_collections.ConfigDict:
    """Returns the settings of an ablated 340M run.

    Args:
      name: a key of `ABLATIONS`; behind a plus the attention that is changed, as in
        `lazyattn.experiment.with_attention`, in place of the paper's.

    Raises:
      InputError: for an unknown name.
    """
    name, _, attention = name.partition("+")
    require(name in ABLATIONS, "the ablation", name, "one of " + ", ".join(ABLATIONS))
    config = recipe("340m", "10b", attention or "paper")
    config.model.attention.update(ABLATIONS[name])
    return config


def recipe(
    size: str, tokens: str, attention: str, *, sequence_length: int = 4096
) -> ml_collections.ConfigDict:
    """Returns the settings of a run.

    Args:
      size: a key of `SIZES`.
      tokens: a key of `TOKENS`: the run's length, and the sample of FineWeb-Edu.
      attention: as in `lazyattn.experiment.with_attention`, e.g. "paper" or "sharp".
      sequence_length: tokens a row. paper: 4096.
    """
    require(size in SIZES, "the size", size, "one of " + ", ".join(SIZES))
    require(tokens in TOKENS, "the number of tokens", tokens, "one of " + ", ".join(TOKENS))
    shape = SIZES[size]
    config = defaults()

    config.model.vocab_size = 32_000  # trainer
    config.model.width = shape.width
    config.model.num_layers = shape.layers
    config.model.mlp_width = shape.mlp_width
    config.model.norm_eps = 1e-6  # trainer
    config.model.tie_embeddings = False  # trainer
    config.model.compute_dtype = "bfloat16"  # trainer
    config.model.remat = shape.remat
    config.model.scan_layers = True  # ours: a compile takes as long for 80 layers as for one
    config.model.attention.num_heads = shape.heads
    config.model.attention.num_kv_heads = shape.kv_heads
    config.model.attention.rope_base = 10_000.0  # the authors' code and the trainer
    config.model.attention.bias_width = 1024  # paper: W; the authors' max_bias_length

    config.data.path = f"data/fineweb_edu_{tokens}"  # ours: where `prepare` was told to write
    config.data.sequence_length = sequence_length
    config.data.batch_size = shape.tokens_per_step // sequence_length
    config.data.packing = "split"  # trainer: documents end to end, cut at row ends

    config.optimizer.learning_rate = shape.learning_rate
    config.optimizer.schedule = "cosine"  # trainer
    config.optimizer.warmup_steps = 1024  # trainer
    config.optimizer.final_fraction = 0.1  # trainer
    config.optimizer.b1 = 0.9  # trainer
    config.optimizer.b2 = 0.95  # trainer
    config.optimizer.eps = 1e-15  # trainer
    config.optimizer.weight_decay = 0.1  # ours: the trainer has a setting, runs differ
    config.optimizer.clip_norm = 1.0  # trainer

    config.training.steps = TOKENS[tokens] // shape.tokens_per_step
    config.training.checkpoint_every = 500  # ours, as all that follows
    config.training.keep_every = config.training.steps // 10
    config.training.eval_every = 1000
    config.training.eval_batches = 16

    # ours: parameters and optimiser state over all devices, whatever their number.
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return with_attention(config, attention)
