"""Muon on the matrices of the blocks, Adam on all else, as one part of the optimizer's chain.

Muon (Jordan et al. 2024) is that of `optax.contrib`: the momentum of a matrix is brought to
singular values near 1. What a matrix is goes by name: heads and their size are one side of those of
attention, and scanned layers are matrices of their own. Embeddings have Adam, as is usual.
"""

import math
from typing import Any

import jax
import optax
from flax import traverse_util
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from lazyattn.experiment.training import OptimizerConfig

# Number of axes that a product sums over, and of those that come out.
_SIDES = {
    **dict.fromkeys(("query", "key", "value", "output_gate"), (1, 2)),
    "output": (2, 1),
    **dict.fromkeys(("gate", "up", "down"), (1, 1)),
}


def _sides(path: tuple[str, ...], x: Any) -> MuonDimensionNumbers | None:
    """Returns which axes are a matrix's two sides; None: Muon is not for it."""
    if path[-1] not in _SIDES:
        return None
    reduced, out = _SIDES[path[-1]]
    first = x.ndim - reduced - out
    axes = range(first, x.ndim)
    return MuonDimensionNumbers(tuple(axes[:reduced]), tuple(axes[reduced:]))


def _dimension_numbers(updates: Any) -> Any:
    """Returns a tree like `updates`, in which what is masked stays so."""
    flat = traverse_util.flatten_dict(updates)
    return traverse_util.unflatten_dict(
        {
            path: x if isinstance(x, optax.MaskedNode) else _sides(path, x)
            for path, x in flat.items()
        }
    )


def is_muon(params: optax.Params) -> optax.Params:
    """Returns a tree like `params` (nested dicts) of bools: True where Muon is used."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
        {path: _sides(path, x) is not None for path, x in flat.items()}
    )


def _is_not_muon(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda muon: not muon, is_muon(params))


def _scale_by_shape(consistent_rms: float) -> optax.GradientTransformation:
    """Returns what scales orthogonal updates, in the two ways that optax has."""

    def factor(path: tuple[str, ...], x: Any) -> Any:
        if isinstance(x, optax.MaskedNode):
            return x
        sides = _sides(path, x)
        assert sides is not None
        fan_in, fan_out = (math.prod(x.shape[axis] for axis in side) for side in sides)  # type: ignore[union-attr]
        if consistent_rms > 0:
            return x * (consistent_rms * math.sqrt(max(fan_in, fan_out)))
        return x * math.sqrt(max(1.0, fan_out / fan_in))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        flat = traverse_util.flatten_dict(updates)
        return traverse_util.unflatten_dict({k: factor(k, x) for k, x in flat.items()}), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_muon_and_adam(
    config: OptimizerConfig, adam: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Returns Muon for the matrices of the blocks, and `adam` for the rest."""
    muon = optax.chain(
        scale_by_muon(
            ns_steps=config.ns_steps,
            beta=config.muon_beta,
            mu_dtype=config.mu_dtype,
            weight_dimension_numbers=_dimension_numbers,
        ),
        _scale_by_shape(config.consistent_rms),
    )
    return optax.chain(optax.masked(muon, is_muon), optax.masked(adam, _is_not_muon))
