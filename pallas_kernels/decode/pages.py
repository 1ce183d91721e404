"""Which pages of keys a backend must read: all but the negligible ones.

No score of query q with a page's keys exceeds

    |scale| |q| max|k| + max b          (Cauchy-Schwarz; max over the page)

and the query's log-sum-exp is at least its score with its own key. So exp(bound - own score)
times the slots of a page bounds the page's softmax mass. A page is left out where that is at
most skip_mass over the number of pages, for every query that reads it: all pages that are left
out hold no more than skip_mass together.

Where tau > 0 every visible key has a weight, and the head reads all that it sees.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.bias import expand
from pallas_kernels.decode.types import PAGE, Inputs, Settings, positions, visible

# Added to score bounds, in nats: covers float32 rounding of norms and scores.
SLACK = 1e-3


def visited(
    inputs: Inputs, settings: Settings, own: Float[Array, "batch new kv_heads d"] | None = None
) -> Bool[Array, "batch kv_heads pages"]:
    """Returns which pages must be read.

    Args:
      inputs, settings: of the call.
      own: the keys at the queries' own positions, as the cache holds them; None: to be found.
    """
    seen = visible(inputs, settings)
    reads = _by_page(seen, False).any(axis=(1, 3))[:, None]
    if inputs.key_norms is None or settings.skip_mass == 0:
        return jnp.broadcast_to(reads, (reads.shape[0], inputs.kv_heads, inputs.pages))
    return reads & ~_negligible(inputs, settings, own)


def _negligible(
    inputs: Inputs, settings: Settings, own: Float[Array, "batch new kv_heads d"] | None
) -> Bool[Array, "batch kv_heads pages"]:
    assert inputs.key_norms is not None
    dtype = jnp.promote_types(inputs.query.dtype, jnp.float32)
    batch, new, _, head_dim = inputs.query.shape
    query = inputs.query.astype(dtype).reshape(batch, new, inputs.kv_heads, inputs.group, head_dim)
    slot = positions(inputs) % inputs.slots
    if own is None:
        own = inputs.of_layer(inputs.key)[jnp.arange(batch)[:, None], slot]
    own = own.astype(dtype)
    if inputs.key_scales is not None:
        scales = inputs.of_layer(inputs.key_scales).swapaxes(1, 2).astype(dtype)
        own *= scales[jnp.arange(batch)[:, None], slot // PAGE][..., None]
    own_score = settings.scale * jnp.einsum("bnhgd,bnhd->bhgn", query, own)
    norms = abs(settings.scale) * jnp.sqrt(jnp.sum(query**2, axis=-1)).transpose(0, 2, 3, 1)
    page = inputs.of_layer(inputs.key_norms).astype(dtype)
    bound = norms[..., None] * page[:, :, None, None] - own_score[..., None] + SLACK
    if inputs.distance_bias is not None:
        highest = highest_bias(inputs, dtype)
        highest -= inputs.distance_bias.astype(dtype)[:, :1, None, None]
        shape = (inputs.kv_heads, inputs.group, *highest.shape[1:])
        bound += highest.reshape(shape).transpose(2, 0, 1, 3, 4)
    # Not a number where norms are none, which is not negligible.
    small = PAGE * jnp.exp(bound) <= settings.skip_mass / inputs.pages
    exists = (positions(inputs) >= 0)[:, None, None, :, None]
    small |= ~exists
    if inputs.offset is not None:
        small &= (inputs.offset <= 0).reshape(1, inputs.kv_heads, inputs.group, 1, 1)
    return small.all(axis=(2, 3))


def highest_bias(inputs: Inputs, dtype: jnp.dtype) -> Float[Array, "heads batch new pages"]:
    """Returns a bound on the bias of each page's keys, seen or not.

    A page's keys lie at consecutive distances, so a few numbers a page are looked up. The page
    with the newest key has the oldest keys of a ring too, and is always read.
    """
    assert inputs.distance_bias is not None
    slope = inputs.distance_slope
    slope = None if slope is None else slope.astype(dtype)
    bias = expand(inputs.distance_bias.astype(dtype), slope, inputs.slots)
    # The highest of `size` distances from each on.
    size = 1
    while size < PAGE:
        none = ((0, 0), (0, min(size, inputs.slots)))
        later = jnp.pad(bias[:, size:], none, constant_values=-jnp.inf)
        bias, size = jnp.maximum(bias, later), 2 * size
    start = PAGE * jnp.arange(inputs.pages, dtype=jnp.int32)
    end = jnp.minimum(start + PAGE, inputs.slots) - 1
    last = (inputs.lengths[:, None] - 1) % inputs.slots
    nearest = jnp.where(start <= last, jnp.maximum(last - end, 0), last - end + inputs.slots)
    before_newest = inputs.new - 1 - jnp.arange(inputs.new, dtype=jnp.int32)
    distance = nearest[:, None] - before_newest[:, None]
    return bias[:, jnp.clip(distance, 0, inputs.slots - 1)]


def _by_page(x: Array, fill: float) -> Array:
    """Returns x [..., slots] as [..., pages, PAGE]."""
    widths = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % PAGE)]
    return jnp.pad(x, widths, constant_values=fill).reshape(*x.shape[:-1], -1, PAGE)
