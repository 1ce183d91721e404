"""Parameters by the names of the authors' PyTorch layers, or of a hub's models, and back.

The authors':

    model.embeddings.weight                    [vocab, width]
    model.layers.N.attn_norm.weight            [width]
    model.layers.N.attn.q_proj.weight          [heads * head_dim, width], k_proj and v_proj
                                               with kv_heads
    model.layers.N.attn.o_proj.weight          [width, heads * head_dim]
    model.layers.N.attn.q_norm.weight          [head_dim], and k_norm, with `qk_norm`
    model.layers.N.attn.learnable_bias_diagonals   [heads, bias_width]
    model.layers.N.attn.tau                    [heads]
    model.layers.N.attn.learnable_bias_slope   [heads], with a tail; ours, theirs has none
    model.layers.N.attn.q_proj.bias            [heads * head_dim], and k_proj's and v_proj's,
                                               with `qkv_bias`
    model.layers.N.attn.g_proj.weight          [heads * head_dim, width], with `output_gate`;
                                               ours, theirs has none
    model.layers.N.mlp_norm.weight             [width]
    model.layers.N.mlp.gate_proj.weight        [mlp_width, width], and up_proj
    model.layers.N.mlp.down_proj.weight        [width, mlp_width]
    model.norm.weight                          [width]
    lm_head.weight                             [vocab, width]

A hub's (`lazyattn.pretrained.hub`) have `self_attn` for `attn`, `embed_tokens` for `embeddings`,
`input_layernorm` for `attn_norm` and `post_attention_layernorm` for `mlp_norm`, and no
`lm_head.weight` where the embedding is tied. Ours in transformers (`OURS`) have the hub's names,
and `self_attn.offset`, `self_attn.distance_delta` and so on, as parameters here are called.

A PyTorch Linear keeps its matrix as [out, in] and heads are one after the other in its
rows; ours is [in, out]. Our embedding is multiplied by width^1/2 on the way in and theirs
is not, so that theirs is ours times that, unless `scale_embedding` is off. A bias of kind
"decay" is written as the table and the slope that it comes to. In `OURS` both stay as they are.

Source of the names: the authors' attention layer in the flash-linear-attention library.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float, Shaped

from lazyattn.errors import InputError
from lazyattn.model.config import ModelConfig
from lazyattn.model.parameters import Params, parameter_shapes
from lazyattn.pretrained import tensor_files
from lazyattn.pretrained.parameters import as_table, table_config

_EMBEDDING = ("embedding",)
INPUT, OUTPUT = "model.embeddings.weight", "lm_head.weight"
BIAS, SLOPE, TAU = "attn.learnable_bias_diagonals", "attn.learnable_bias_slope", "attn.tau"

# Of a matrix: how many of our first axes go in. None: a vector or table, kept as it is. 0: a
# vector there, whose entries are those of heads here.
_LAYER: dict[tuple[str, ...], tuple[str, int | None]] = {
    ("attention_norm", "scale"): ("attn_norm.weight", None),
    ("attention", "query"): ("attn.q_proj.weight", 1),
    ("attention", "key"): ("attn.k_proj.weight", 1),
    ("attention", "value"): ("attn.v_proj.weight", 1),
    ("attention", "output"): ("attn.o_proj.weight", 2),
    ("attention", "query_norm", "scale"): ("attn.q_norm.weight", None),
    ("attention", "key_norm", "scale"): ("attn.k_norm.weight", None),
    ("attention", "query_bias"): ("attn.q_proj.bias", 0),
    ("attention", "key_bias"): ("attn.k_proj.bias", 0),
    ("attention", "value_bias"): ("attn.v_proj.bias", 0),
    ("attention", "output_gate"): ("attn.g_proj.weight", 1),
    ("attention", "distance_bias"): (BIAS, None),
    ("attention", "distance_slope"): (SLOPE, None),
    ("attention", "offset"): (TAU, None),
    ("mlp_norm", "scale"): ("mlp_norm.weight", None),
    ("mlp", "gate"): ("mlp.gate_proj.weight", 1),
    ("mlp", "up"): ("mlp.up_proj.weight", 1),
    ("mlp", "down"): ("mlp.down_proj.weight", 1),
}
_WHOLE = {
    _EMBEDDING: INPUT,
    ("final_norm", "scale"): "model.norm.weight",
    ("unembedding",): OUTPUT,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Naming:
    """What tensors are called.

    Attributes:
      layer: path here -> name there behind `model.layers.N.`, and axes as in `_LAYER`.
      whole: path here -> name there, of arrays of no layer.
      as_here: whether a "decay" stays one, and the embedding is not scaled.
    """

    layer: Mapping[tuple[str, ...], tuple[str, int | None]]
    whole: Mapping[tuple[str, ...], str]
    as_here: bool = False


AUTHORS = Naming(_LAYER, _WHOLE)


def _hub_name(name: str) -> str:
    head, _, tail = name.partition(".")
    renamed = {
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attn": "self_attn",
    }
    return f"{renamed.get(head, head)}.{tail}"


# What only lazy layers have, or our own, has no name there.
HUB = Naming(
    {
        path: (_hub_name(name), axes)
        for path, (name, axes) in _LAYER.items()
        if not path[-1].startswith(("distance", "offset", "output_gate"))
    },
    _WHOLE | {_EMBEDDING: "model.embed_tokens.weight"},
)
_LEARNED = ("distance_delta", "distance_log_slope", "distance_bias", "distance_slope", "offset")
OURS = Naming(
    {path: (_hub_name(name), axes) for path, (name, axes) in _LAYER.items()}
    | {("attention", name): (f"self_attn.{name}", None) for name in _LEARNED},
    HUB.whole,
    as_here=True,
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor: its name there, and where it is here.

    Attributes:
      name: in PyTorch.
      path: of the array here, within a block where `layer` is given.
      shape: of the array here, of one layer.
      layer: number of the block; None: in none.
      axes_in: as in `_LAYER`.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    layer: int | None = None
    axes_in: int | None = None

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape there."""
        if self.axes_in is None:
            return self.shape
        if self.axes_in == 0:
            return (math.prod(self.shape),)
        return math.prod(self.shape[self.axes_in :]), math.prod(self.shape[: self.axes_in])

    def to_torch(self, array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Returns the tensor of one layer's array."""
        if self.axes_in is None:
            return array
        return array.reshape(self.torch_shape[::-1]).T  # of one axis it is itself

    def from_torch(self, array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Returns one layer's array of the tensor."""
        return array if self.axes_in is None else array.T.reshape(self.shape)


def tensor_shapes(config: ModelConfig, naming: Naming = AUTHORS) -> dict[str, tuple[int, ...]]:
    """Returns the PyTorch shape of every tensor of a model, by name, layer after layer."""
    shapes = {tensor.name: tensor.torch_shape for tensor in tensors(config, naming)}
    return shapes | {OUTPUT: shapes[INPUT]} if naming is AUTHORS else shapes


def write(
    folder: Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    dtype: str,
    naming: Naming = AUTHORS,
    max_bytes: int = tensor_files.MAX_BYTES,
) -> list[str]:
    """Writes a model as safetensors: matrices in `dtype`, what `parameters.cast` keeps in float32.

    Args:
      folder: that exists.
      params, config, naming: as in `to_torch`. All of a `HUB`'s tensors are in `dtype`.
      dtype: "float32" or "bfloat16".
      max_bytes: of a file.

    Returns:
      The names of the files.
    """
    kept = {theirs for theirs, axes_in in naming.layer.values() if not axes_in} | {"norm.weight"}

    def stored(name: str) -> np.dtype:
        small = naming is not HUB and any(name.endswith("." + one) for one in kept)
        return jnp.dtype("float32" if small else dtype)

    shapes = tensor_shapes(config, naming).items()
    sizes = {name: stored(name).itemsize * math.prod(shape) for name, shape in shapes}
    tensors = ((name, x.astype(stored(name))) for name, x in to_torch(params, config, naming))
    return tensor_files.write(folder, tensors, sizes, max_bytes)


def to_torch(
    params: Mapping[str, Any], config: ModelConfig, naming: Naming = AUTHORS
) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    """Yields every tensor by name, float32 and contiguous, in the order of `tensor_shapes`.

    One tensor is in memory at a time; one that devices share is gathered.

    Args:
      params: the model's parameters, float32, on any devices.
      config: the model; for `HUB` one that `lazyattn.pretrained.hub.as_settings` takes.
      naming: what tensors are called.
    """
    scale = np.float32(1 if naming.as_here else config.embedding_factor)
    if not naming.as_here:
        params, config = as_table(params, config)
    arrays = traverse_util.flatten_dict(params)
    for tensor in tensors(config, naming):
        array = tensor.to_torch(_gathered(_find(arrays, tensor)))
        # What is not contiguous, safetensors would write in the order it has in memory.
        yield (
            tensor.name,
            np.ascontiguousarray(array * scale if tensor.path == _EMBEDDING else array),
        )
    if config.tie_embeddings and naming is AUTHORS:
        yield OUTPUT, _gathered(params["embedding"])


def from_torch(
    read: Callable[[str], Float[np.ndarray, "..."]], config: ModelConfig, where: str
) -> Params:
    """Returns the parameters, float32 in the host's memory.

    Args:
      read: name -> tensor, of the shape in `tensor_shapes`.
      config: the model, whose bias is a table.
      where: the tensors are from, for messages.

    Raises:
      InputError: if the embeddings of a tied model are two.
    """
    layers: dict[tuple[str, ...], list[np.ndarray]] = {}
    found: dict[tuple[str, ...], np.ndarray] = {}
    for tensor in tensors(config):
        name = OUTPUT if tensor.name == INPUT and config.tie_embeddings else tensor.name
        array = np.asarray(read(name), np.float32)
        if name == INPUT:
            array = _unscaled(array, np.float32(config.embedding_factor))
        array = np.ascontiguousarray(tensor.from_torch(array))
        if tensor.layer is None:
            found[tensor.path] = array
        else:
            layers.setdefault(tensor.path, []).append(array)
    for path, arrays in layers.items():
        if config.scan_layers:
            found["blocks", *path] = np.stack(arrays)
        else:
            found |= {(f"blocks_{layer}", *path): array for layer, array in enumerate(arrays)}
    if config.tie_embeddings:
        expected = found[_EMBEDDING] * np.float32(config.embedding_factor)
        # Both may have been rounded to bfloat16, which has 8 bits.
        if not np.allclose(np.asarray(read(INPUT), np.float32), expected, rtol=2**-7, atol=0):
            raise InputError(
                f"{where} has a {INPUT} that is not {OUTPUT} times"
                f" {config.embedding_factor:g}, so that the model is not tied, as its settings say."
            )
    return traverse_util.unflatten_dict(found)


@functools.cache
def tensors(config: ModelConfig, naming: Naming = AUTHORS) -> tuple[Tensor, ...]:
    """Returns a model's tensors, but for the second copy of a tied embedding."""
    config = config if naming.as_here else table_config(config)
    leaves = traverse_util.flatten_dict(parameter_shapes(config))
    block, stacked = ("blocks", 1) if config.scan_layers else ("blocks_0", 0)

    def whole(path: tuple[str, ...]) -> Tensor:
        return Tensor(naming.whole[path], path, leaves[path].shape)

    found = [whole(_EMBEDDING)]
    for layer in range(config.num_layers):
        for path, (name, axes_in) in naming.layer.items():
            if (block, *path) in leaves:
                shape = leaves[block, *path].shape[stacked:]
                theirs = f"model.layers.{layer}.{name}"
                found.append(Tensor(theirs, path, shape, layer, axes_in))
    found.append(whole(("final_norm", "scale")))
    if not config.tie_embeddings:
        found.append(whole(("unembedding",)))
    return tuple(found)


def _find(arrays: Mapping[tuple[str, ...], Any], tensor: Tensor) -> Any:
    if tensor.layer is None:
        return arrays[tensor.path]
    stacked = arrays.get(("blocks", *tensor.path))
    return (
        arrays[f"blocks_{tensor.layer}", *tensor.path] if stacked is None else stacked[tensor.layer]
    )


def _gathered(array: Any) -> Float[np.ndarray, "..."]:
    return np.asarray(jax.device_get(array), np.float32)


def _unscaled(
    array: Float[np.ndarray, "vocab width"], scale: np.float32
) -> Float[np.ndarray, "vocab width"]:
    """Returns what gives `array` when it is multiplied by `scale`, to the bit if anything does.

    A quotient is rounded; of it and its two neighbours, the first that does is taken.
    """
    found = array / scale
    for towards in (-np.inf, np.inf):
        near = np.nextafter(array / scale, np.float32(towards), dtype=np.float32)
        better = (found * scale != array) & (near * scale == array)
        found = np.where(better, near, found)
    return found
