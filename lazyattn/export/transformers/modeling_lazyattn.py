# SPDX-License-Identifier: Apache-2.0
"""Language models with Lazy Attention (arXiv 2601.00919) in PyTorch, for transformers 5.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

lazyattn exports this file beside the weights; training and fast kernels are there. Here all is
plain PyTorch, and queries are taken some at a time, so that memory grows with the length.
Attention of head h, from query i to the n_i keys j that it may see:

    s_ij = (R q_i) . (R k_j) / sqrt(d) + b_h(i - j)        b: the learned distance bias
    a_ij = max(0, softmax_j(s_ij) + offset_h / n_i)        o_i = sum_j a_ij v_j

Variants leave out the bias or the offset, or divide the offset by another number. A text must
begin with the tokenizer's first token, as the texts of training did; the tokenizer adds it.
"""

import math

import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"This model needs transformers 5, but {transformers.__version__} is here.")

QUERIES_AT_ONCE = 256
# What transformers calls the cache, up to 5.23 and since.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class LazyAttnConfig(PretrainedConfig):
    """What a model is: `kwargs` has the sizes, by transformers' usual names.

    `lazyattn` has all settings, by the names of lazyattn's own dataclasses; `global_heads` the
    numbers of the heads without slope and window.
    """

    model_type = "lazyattn"

    def __init__(self, lazyattn=None, global_heads=(), use_cache=True, **kwargs):
        self.lazyattn, self.global_heads, self.use_cache = lazyattn, global_heads, use_cache
        super().__init__(**kwargs)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        """Returns `x` normalized, in its dtype."""
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale * self.weight.float()).to(x.dtype)


class LazyAttention(nn.Module):
    """Grouped-query attention with a distance bias and an offset a head, those there are."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.settings = layer, config.lazyattn["model"]["attention"]
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.trained_length = config.head_dim, config.max_position_embeddings
        self.global_heads, settings = list(config.global_heads), self.settings

        def into(heads, bias=settings["qkv_bias"]):
            return nn.Linear(config.hidden_size, heads * self.head_dim, bias=bias)

        self.q_proj = into(self.heads)
        self.k_proj, self.v_proj = into(self.kv_heads), into(self.kv_heads)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        if settings["output_gate"]:
            self.g_proj = into(self.heads, bias=False)
        if settings["qk_norm"]:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.has_bias = settings["variant"] not in ("softmax", "lazy_no_bias")
        self.has_offset = settings["variant"] not in ("softmax", "biased_softmax")
        if self.has_bias and settings["bias_kind"] == "decay":
            self.distance_delta = nn.Parameter(torch.zeros(self.heads, settings["bias_width"]))
            self.distance_log_slope = nn.Parameter(torch.zeros(self.heads))
        elif self.has_bias:
            self.distance_bias = nn.Parameter(torch.zeros(self.heads, settings["bias_width"]))
            if settings["bias_tail"]:
                self.distance_slope = nn.Parameter(torch.zeros(self.heads))
        if self.has_offset:
            self.offset = nn.Parameter(torch.zeros(self.heads))

    def is_global(self, device):
        """Returns bool [heads]: which have no slope, no window and, if so set, no RoPE."""
        found = torch.zeros(self.heads, dtype=torch.bool, device=device)
        found[self.global_heads] = True
        return found

    def bias_by_distance(self, length, device):
        """Returns b(x) of distances x = 0 ... length - 1, float32 [heads, length]."""
        is_global, width = self.is_global(device)[:, None], self.settings["bias_width"]
        near = torch.arange(width, device=device)
        slope = None
        if self.settings["bias_kind"] == "decay":
            # The bounds are those of training: no slope is 0 or overflows.
            slope = self.distance_log_slope.float().clamp(-30, 10).exp()[:, None]
            slope = slope.masked_fill(is_global, 0)
            table = self.distance_delta.float() - slope * near
        else:
            table = self.distance_bias.float()
            if self.settings["bias_tail"]:
                slope = self.distance_slope.float()[:, None].masked_fill(is_global, 0)
        table = table.masked_fill(is_global & (near == width - 1), 0)
        distance = torch.arange(length, device=device)
        found = table[:, distance.clamp(max=width - 1)]
        beyond = distance - (width - 1)
        tail = torch.zeros_like(found) if slope is None else found - slope * beyond
        return torch.where(beyond > 0, tail, found)

    def rotated(self, x, rotation):
        """Returns queries or keys [batch, heads, length, head_dim] with RoPE, where it is."""
        if not self.settings["rope"]:
            return x
        (cos, sin), (first, second) = rotation, x.float().chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        turned = turned.to(x.dtype)
        if self.settings["global_rope"] or not self.global_heads:
            return turned
        without = self.is_global(x.device).reshape(x.shape[1], -1)[:, 0]
        return torch.where(without[:, None, None], x, turned)

    def forward(self, x, rotation, past, start, mask, cache):
        """Returns the update of the residual stream.

        Args:
          x: [batch, length, width].
          rotation: cos and sin of RoPE's angles, [batch, 1, length, head_dim / 2] each.
          past: how many keys the cache has already.
          start, mask: as in `attend`, of all queries and keys.
          cache: of transformers, or None.
        """

        def heads(projection):
            return projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        query, key, value = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)
        if self.settings["qk_norm"]:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = self.rotated(query, rotation), self.rotated(key, rotation)
        length = x.shape[1]
        if cache is not None:
            # One of a fixed length has to be told where, up to some version.
            where = {"cache_position": past + torch.arange(length, device=x.device)}
            key, value = cache.update(key, value, self.layer, where)
        bias = self.bias_by_distance(key.shape[2], x.device) if self.has_bias else None
        parts = []
        for first in range(0, length, QUERIES_AT_ONCE):
            last = min(first + QUERIES_AT_ONCE, length)
            rows, seen = query[:, :, first:last], slice(past + last)
            keys = key[:, :, seen], value[:, :, seen], None if mask is None else mask[:, seen]
            parts.append(self.attend(rows, *keys, start[:, first:last], bias))
        out = torch.cat(parts, dim=2).transpose(1, 2).flatten(2)
        if self.settings["output_gate"]:
            out = out * self.g_proj(x).sigmoid()
        return self.o_proj(out)

    def attend(self, query, key, value, mask, start, bias):
        """Returns what some queries take of the keys, [batch, heads, queries, head_dim].

        Args:
          query: [batch, heads, queries, head_dim].
          key, value: [batch, kv_heads, keys, head_dim], up to those of the last query.
          mask: which keys are no padding, [batch, keys]; None: all.
          start: first key of its document, [batch or 1, queries].
          bias: by distance, [heads, keys or more], or None.
        """
        keys = torch.arange(key.shape[2], device=key.device)
        distance = keys[-query.shape[2] :, None] - keys
        visible = (distance >= 0) & (keys >= start[..., None])
        if mask is not None:
            visible = visible & mask[:, None]
        visible = visible[:, None]  # [batch, heads or 1, queries, keys]
        if self.settings["window"] is not None:
            is_global = self.is_global(key.device)[:, None, None]
            visible = visible & (is_global | (distance < self.settings["window"]))
        lowest = torch.finfo(torch.float32).min
        added = torch.zeros((), device=key.device)
        if bias is not None:
            added = bias[:, distance.clamp(min=0)]
        if not self.has_offset:
            # Softmax. A row that sees nothing is padding; -inf there would be NaN everywhere.
            dtype = query.dtype if bias is None else torch.float32
            added = torch.where(visible, added, lowest).clamp(min=torch.finfo(dtype).min).to(dtype)
            operands = [x.to(dtype) for x in (query, key, value)]
            grouped = self.heads != self.kv_heads
            out = functional.scaled_dot_product_attention(*operands, added, enable_gqa=grouped)
            return out.to(value.dtype)

        # Heads that share keys are rows of one product. All is float32 up to the weights: in
        # bfloat16 p + offset / n rounds to zero.
        def grouped(x):
            return x.reshape(len(x), self.kv_heads, -1, x.shape[-1])

        scores = grouped(query).float() @ key.float().transpose(-1, -2) * self.head_dim**-0.5
        scores = scores.reshape(*query.shape[:3], -1) + added
        softmax = scores.masked_fill(~visible, lowest).softmax(-1)
        others = {"lazy_constant_offset": 1, "lazy_length_offset": self.trained_length}
        count = visible.sum(-1, keepdim=True).clamp(min=1)
        divisor = others.get(self.settings["variant"], count)
        weights = (softmax + self.offset.float()[:, None, None] / divisor).relu()
        weights = weights.masked_fill(~visible, 0)
        if self.settings["variant"] == "lazy_renormalized":
            total = weights.sum(-1, keepdim=True)
            weights = weights / total.masked_fill(total == 0, 1)
        return (grouped(weights.to(value.dtype)) @ value).reshape(query.shape)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(*sizes, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(*sizes[::-1], bias=False)

    def forward(self, x):
        """Returns the update of the residual stream."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LazyAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, *rest):
        """Returns the residual stream after the layer; `rest` as in `LazyAttention`."""
        x = x + self.self_attn(self.input_layernorm(x), *rest)
        return x + self.mlp(self.post_attention_layernorm(x))


class LazyAttnPreTrainedModel(PreTrainedModel):
    """What transformers knows of all these models."""

    config_class = LazyAttnConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _supports_sdpa = True
    # Small, and bfloat16 would move what a weight's being zero hangs on.
    _keep_in_fp32_modules_strict = ["norm", "offset", "distance"]  # noqa: RUF012


class LazyAttnModel(LazyAttnPreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def rotation(self, positions):
        """Returns cos and sin of RoPE's angles, float32 [batch, 1, length, head_dim / 2]."""
        settings, half = self.config.lazyattn["model"]["attention"], self.config.head_dim // 2
        powers = torch.arange(half, device=positions.device, dtype=torch.float32) / half
        frequencies = settings["rope_base"] ** -powers
        slow = frequencies / settings["rope_factor"]
        if settings["rope_scaling"] == "linear":
            frequencies = slow
        elif settings["rope_scaling"] == "llama3":
            turns = frequencies * (settings["rope_length"] / (2 * math.pi))
            low, high = settings["rope_low"], settings["rope_high"]
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            frequencies = (1 - kept) * slow + kept * frequencies
        angles = positions[:, None, :, None].float() * frequencies
        return angles.cos(), angles.sin()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        use_cache=None,
        cache=None,
        past_key_values=None,
        output_hidden_states=False,
        **kwargs,
    ):
        """Returns the hidden states, normed, and the cache.

        Args:
          input_ids: [batch, length], of one document a row; or `inputs_embeds`.
          attention_mask: [batch, keys], those in the cache first; 0 where one is padding.
          position_ids: [batch, length], place of each token in its document. Where there is no
            `attention_mask`, documents begin where it is 0, and none sees another.
          inputs_embeds: [batch, length, width] in place of `input_ids`.
          use_cache: whether to return one; None: as `config` says.
          cache, past_key_values: of before, by the name of either version.
          output_hidden_states: whether to return those before every layer, too.
          kwargs: not used, but that `output_attentions` is refused.
        """
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions is True, but this model returns no weights.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.lazyattn["model"]["scale_embedding"]:
            x = x * self.config.hidden_size**0.5
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        length, past = x.shape[1], 0 if cache is None else int(cache.get_seq_length())
        index, mask = past + torch.arange(length, device=x.device), None
        start = torch.zeros_like(index)[None]
        if attention_mask is not None:
            if attention_mask.shape != (len(x), past + length):
                raise ValueError(
                    f"attention_mask's shape is {tuple(attention_mask.shape)}, but it must be"
                    f" {(len(x), past + length)}: [batch, keys], those in the cache included."
                )
            mask = attention_mask.bool()
            if position_ids is None:
                position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, past : past + length]
        elif position_ids is None:
            position_ids = index[None]
        else:
            start = index - position_ids
        rotation, streams = self.rotation(position_ids), ()
        for layer in self.layers:
            streams += (x,)
            x = layer(x, rotation, past, start, mask, cache)
        x = self.norm(x)
        streams = (*streams, x) if output_hidden_states else None
        return BaseModelOutputWithPast(x, hidden_states=streams, **{CACHE: cache})


class LazyAttnForCausalLM(LazyAttnPreTrainedModel, GenerationMixin):
    """Token ids to logits of the next token, and with labels to the loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = LazyAttnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """Returns the mask as it is, [batch, keys], for a cache of a fixed length, too."""
        return attention_mask

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Returns logits, float32, of the last `logits_to_keep` tokens (0: of all) and the cache.

        `labels` are the tokens themselves, [batch, length], -100 where none counts: the loss is
        the mean over those behind the first. All else is as in `LazyAttnModel`.
        """
        found = self.model(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        logits = self.lm_head(found.last_hidden_state[:, -logits_to_keep:]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        rest = {CACHE: getattr(found, CACHE), "hidden_states": found.hidden_states}
        return CausalLMOutputWithPast(loss, logits, **rest)
