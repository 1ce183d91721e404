"""Plain causal softmax attention by others, to compare with."""

import functools
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jaxtyping import Array, Float

Attention = Callable[..., Float[Array, "batch length heads head_dim"]]

_TUNED = "tokamax_tuned"


def _jax_nn(
    name: str, implementation: str, windowed: bool, head_dim: int, window: int | None
) -> Iterable[tuple[str, Attention]]:
    del head_dim
    # Keys before a query, and after it.
    seen = (window - 1, 0) if windowed and window is not None else None

    def attention(query: Array, key: Array, value: Array) -> Array:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            local_window_size=seen,
            implementation=implementation,
        )

    yield name, attention


def _splash(head_dim: int, window: int | None) -> Iterable[tuple[str, Attention]]:
    del window
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    def attention(query: Array, key: Array, value: Array) -> Array:
        length, heads = query.shape[1:3]
        size = min(1024, length)
        names = ("block_q", "block_kv", "block_kv_compute")
        blocks = dict.fromkeys([*names, *(f"{name}_dkv" for name in names[:2])], size)
        sizes = kernels.BlockSizes(**blocks, block_kv_dkv_compute=size, use_fused_bwd_kernel=True)
        mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
        attend = jax.vmap(kernels.make_splash_mha_single_device(mask, block_sizes=sizes))
        parts = (query * head_dim**-0.5, key, value)
        return attend(*(x.swapaxes(1, 2) for x in parts)).swapaxes(1, 2)

    yield "splash", attention


def _import_tokamax() -> Any:
    # Its benchmark helpers import a profiler that needs a lot more packages.
    for name in ("xprof", "xprof.cli", "xprof.cli.tools"):
        sys.modules.setdefault(name, types.ModuleType(name))
    tool = types.ModuleType("xprof.cli.tools.get_kernel_stats_tool")
    sys.modules.setdefault(tool.__name__, tool)
    sys.modules["xprof.cli.tools"].get_kernel_stats_tool = tool  # type: ignore[attr-defined]
    import tokamax

    return tokamax


def _tokamax(head_dim: int, window: int | None) -> Iterable[tuple[str, Attention]]:
    del head_dim, window

    def attention(query: Array, key: Array, value: Array) -> Array:
        return _import_tokamax().dot_product_attention(
            query, key, value, is_causal=True, implementation="triton"
        )

    yield "tokamax", attention


def _tokamax_tuned(head_dim: int, window: int | None) -> Iterable[tuple[str, Attention]]:
    del window
    forward = [(128, 64, 4, 3), (64, 128, 4, 3), (128, 64, 8, 3)]
    backward = [(64, 64, 64, 64, 4, 3 if head_dim <= 64 else 2), (64, 64, 64, 64, 4, 2)]
    if head_dim > 64:
        forward = [(128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 2)]
        backward = [(64, 64, 64, 64, 4, 2), (32, 64, 64, 32, 4, 2)]
    backward += backward[-1:]

    def attention(ahead: Any, back: Any, query: Array, key: Array, value: Array) -> Array:
        _import_tokamax()
        from tokamax._src.ops.attention import pallas_triton, pallas_triton_vjp

        names = ("block_m1", "block_n1", "block_m2", "block_n2", "num_warps", "num_stages")
        vjp = pallas_triton_vjp.PallasTritonFlashAttentionVjp(
            config=pallas_triton_vjp.Config(**dict(zip(names, back, strict=True)))
        )
        names = ("block_q", "block_k", "num_warps", "num_stages")
        config = pallas_triton.Config(**dict(zip(names, ahead, strict=True)))
        op = pallas_triton.PallasTritonFlashAttention(config=config, vjp=vjp)
        return op(query, key, value, is_causal=True)

    for ahead, back in zip(forward, backward, strict=True):
        name = f"{_TUNED} {ahead} {back}"
        yield name, functools.partial(attention, ahead, back)


# Name -> function of the head size and the window -> (name in the table, attention) pairs.
PEERS: dict[str, Callable[[int, int | None], Iterable[tuple[str, Attention]]]] = {
    "cudnn": functools.partial(_jax_nn, "cudnn", "cudnn", False),
    "cudnn_window": functools.partial(_jax_nn, "cudnn_window", "cudnn", True),
    "xla_softmax": functools.partial(_jax_nn, "xla_softmax", "xla", False),
    "tokamax": _tokamax,
    "splash": _splash,
    _TUNED: _tokamax_tuned,
}


def keep_fastest(results: list[Any]) -> list[Any]:
    """Leaves only the fastest configuration of each peer that was tried with several."""
    kept: list[Any] = []
    best: dict[tuple[str, str], Any] = {}
    for result in results:
        if not result.implementation.startswith(_TUNED):
            kept.append(result)
        elif result.error is None:
            key = (result.shape, result.which)
            if key not in best or result.milliseconds < best[key].milliseconds:
                best[key] = result
    return kept + list(best.values())
