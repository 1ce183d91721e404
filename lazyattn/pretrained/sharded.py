"""Tensors read straight to the devices that want them: a host never holds a whole model."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from lazyattn.model.config import ModelConfig
from lazyattn.model.parameters import Params
from lazyattn.pretrained import parameters
from lazyattn.pretrained.names import Naming, Tensor, tensors

# Name and a slice of each axis -> that part of the tensor, which alone is read.
Read = Callable[[str, tuple[slice, ...]], Float[np.ndarray, "..."]]

_AT_ONCE = min(8, os.cpu_count() or 1)  # layers


def read_params(
    read: Read, config: ModelConfig, naming: Naming, mesh: jax.sharding.Mesh | None
) -> Params:
    """Returns a model's parameters on devices, float32.

    In the host's memory there is one device's part of one array at a time (of all layers, where
    they are scanned), and the parts of at most `_AT_ONCE` tensors that it comes from.

    Args:
      read: of tensors with the shapes of `names.tensor_shapes`.
      config: the model. Its embedding is stored as it is here.
      naming: the tensors' names.
      mesh: devices; None: all on the first one.

    Raises:
      InputError: if the mesh does not divide an array.
    """
    sources: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in tensors(config, naming):
        path = tensor.path
        if tensor.layer is not None:
            name = "blocks" if config.scan_layers else f"blocks_{tensor.layer}"
            path = (name, *path)
        sources.setdefault(path, []).append(tensor)
    wanted = traverse_util.flatten_dict(parameters.placed_shapes(config, mesh))
    assert wanted.keys() == sources.keys()
    found = {}
    for path, leaf in wanted.items():
        stacked = config.scan_layers and sources[path][0].layer is not None
        found[path] = _array(read, sources[path], stacked, leaf)
    return traverse_util.unflatten_dict(found)


def _array(read: Read, sources: Sequence[Tensor], stacked: bool, leaf: Any) -> jax.Array:
    parts: list[Any] = []
    before: dict[tuple[slice, ...], Any] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        index = tuple(slice(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True))
        if index in before:  # a copy of what another device has
            parts.append(jax.device_put(before[index], device))
            continue
        part = np.empty([s.stop - s.start for s in index], np.float32)
        if stacked:
            _fill(read, sources[index[0]], index[1:], part)
        else:
            part[...] = _part(read, sources[0], index)
        before[index] = jax.device_put(part, device)
        parts.append(before[index])
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def _fill(
    read: Read, layers: Sequence[Tensor], index: tuple[slice, ...], found: Float[np.ndarray, "..."]
) -> None:
    """Reads a part of each layer's tensor, several at once: numpy lets others run meanwhile."""

    def fill(layer: int) -> None:
        found[layer] = _part(read, layers[layer], index)

    with futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(fill, range(len(layers))))


def _part(read: Read, tensor: Tensor, index: tuple[slice, ...]) -> Float[np.ndarray, "..."]:
    """Returns a part of the array that a tensor is here."""
    if tensor.axes_in is None:
        return read(tensor.name, index)
    shape, axes = tensor.shape, tensor.axes_in
    sides = [(shape[:axes], index[:axes]), (shape[axes:], index[axes:])]
    ins, outs = (_flat(*side) for side in sides)
    block = read(tensor.name, (outs, ins) if axes else (outs,)).T
    # Of each side the first axis has been cut, the others not yet.
    whole = []
    cuts: list[slice] = []
    for sizes, part in sides:
        if sizes:
            whole += [part[0].stop - part[0].start, *sizes[1:]]
            cuts += [slice(None), *part[1:]]
    return block.reshape(whole)[tuple(cuts)]


def _flat(shape: tuple[int, ...], index: tuple[slice, ...]) -> slice:
    """Returns the rows of a flattened side that its first axis' part takes up."""
    if not shape:
        return slice(0, 1)
    inner = math.prod(shape[1:])
    return slice(index[0].start * inner, index[0].stop * inner)
