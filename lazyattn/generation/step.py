"""A step of a few tokens in few kernels on a GPU: eight a layer. Off unless `fused` asks for it.

The layers are put together here from kernels that do several things at once; else `Transformer`
does the step, which was faster when both were timed (docs/log/2026-11-30-decoding-kernels.md). Norm
and projections are one (`triton_dense`); norms, RoPE and writing to the cache (`enter`); attention
three; its output with the residual stream; norm, SwiGLU's first half; and its second.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lazyattn import rotary, sharding
from lazyattn.generation.attend import Step, Work
from lazyattn.generation.cache import GroupCache, KVCache
from lazyattn.model.attention_layer import rope_scaling
from lazyattn.model.config import ModelConfig
from lazyattn.model.embedding import look_up
from lazyattn.model.layers import RMSNorm
from pallas_kernels.decode import append
from pallas_kernels.triton import support


def unsupported(config: ModelConfig, cache: KVCache, new: int) -> str | None:
    """Returns why a step is left to `Transformer`, as the end of "... since ..."; None: it isn't.

    Args:
      config: the model.
      cache: of the step.
      new: tokens a row.
    """
    att, head_dim = config.attention, config.head_dim
    if (refused := support.refusal(head_dim, head_dim, config.compute_dtype)) is not None:
        return refused
    if sharding.active_mesh() is not None:
        return "devices share the work"
    if cache.plan.quantized:
        return "the cache is int8"
    if not att.rope or (att.num_global_heads and not att.global_rope):
        return "not all heads have RoPE"
    if att.output_gate or att.qkv_bias:
        return "the projections have biases or a gate"
    for layer in cache.layers:
        held = [(of.keys, of.values, of.key_norms) for of in layer]
        if (refused := append.unsupported(held, new)) is not None:
            return refused
    from pallas_kernels.decode import triton_dense  # Triton takes a second to import.

    heads = [n * head_dim for n in (att.num_heads, att.kv_heads)]
    columns = [*heads, config.width, config.hidden_width]
    return triton_dense.unsupported(cache.lengths.shape[0] * new, columns)


def forward(
    params: Mapping[str, Any],
    config: ModelConfig,
    tokens: Int[Array, "batch new"],
    cache: KVCache,
    count: Int[Array, " batch"],
) -> tuple[Float[Array, "batch new width"], KVCache]:
    """Returns what `prepared.forward` returns of a step."""
    from pallas_kernels.decode.triton_dense import dense

    att, start = config.attention, cache.lengths
    batch, new = tokens.shape
    positions = start[:, None] + jnp.arange(new, dtype=jnp.int32)
    angles = rotary.cos_and_sin(positions, config.head_dim, att.rope_base, rope_scaling(att))
    lengths = jnp.where(count > 0, start + new, 0)
    eps = config.norm_eps
    x = look_up(params["embedding"], tokens.reshape(-1)[None])[0] * config.embedding_factor
    x = x.astype(config.compute_dtype)
    layers = []
    for n, groups in enumerate(cache.plan.layers):
        block = params[f"blocks_{n}"]
        own, mlp = block["attention"], block["mlp"]
        matrices = [own[name].reshape(config.width, -1) for name in ("query", "key", "value")]
        projected = dense(x, *matrices, norm=block["attention_norm"]["scale"], epsilon=eps)
        scales = None
        if att.qk_norm:
            scales = own["query_norm"]["scale"], own["key_norm"]["scale"]
        query, found = append.enter(
            [(of.keys, of.values, of.key_norms) for of in cache.layers[n]],
            [group.heads for group in groups],
            projected.reshape(batch, new, -1, config.head_dim),
            scales,
            angles,
            start,
            count,
            eps,
        )
        held = tuple(GroupCache(*of) for of in found)
        layers.append(held)
        names = ("distance_bias", "distance_slope", "offset")
        learned = {name: own[name] for name in names if name in own}
        work = Work(att, cache.plan, groups, Step.STEP)
        out = work.attention(query, held, lengths, learned).reshape(batch * new, -1)
        x = dense(out, own["output"].reshape(-1, config.width), residual=x)
        both = mlp["gate_up"].reshape(config.width, -1)
        hidden = dense(x, both, norm=block["mlp_norm"]["scale"], epsilon=eps, gated=True)
        x = dense(hidden, mlp["down"], residual=x)
    final: Any = RMSNorm(eps).apply({"params": params["final_norm"]}, x)
    cache = dataclasses.replace(cache, layers=tuple(layers), lengths=start + count)
    return final.reshape(batch, new, -1), cache
