"""Pages that are not read hold no more mass than allowed, whatever the keys."""

import jax
import numpy as np
import pytest

from lazyattn.decode_attention import PAGE
from pallas_kernels.decode import pages
from tests import oracle
from tests.pallas_kernels.decode import suite

STEEP = oracle.Case("", (1, 1500, 4, 2, 16), 256, "alibi", True, (-1.0, -0.5))


def _mass_left_out(args, skip_mass):
    """Returns the share of pages left out, and the largest mass they hold for a query."""
    inputs, settings = suite.inputs_of(args), suite.settings_of(args, skip_mass)
    visited = np.asarray(jax.jit(pages.visited, static_argnums=1)(inputs, settings))
    left_out, most = [], 0.0
    length, new = int(args["lengths"][0]), args["query"].shape[1]
    j = np.arange(length)
    for i, h in np.ndindex(new, args["query"].shape[2]):
        t = length - new + i
        table = args["distance_bias"][h].astype(np.float64)
        past = t - j - (len(table) - 1)
        tail = table[-1] - args["distance_slope"][h] * past
        keys = args["key_cache"][0, j, h // 2].astype(np.float64)
        s = settings.scale * keys @ args["query"][0, i, h].astype(np.float64)
        s += np.where(past <= 0, table[np.clip(t - j, 0, len(table) - 1)], tail)
        s[j > t] = -np.inf
        p = np.exp(s - s.max())
        out = ~np.repeat(visited[0, h // 2], PAGE)[:length]
        most = max(most, (p * out).sum() / p.sum())
        left_out.append(out.mean())
    return np.mean(left_out), most


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("skip_mass", [1e-6, 1e-2])
def test_mass_of_what_is_left_out(new, skip_mass):
    share, most = _mass_left_out(suite.arrays(suite.Decode(STEEP, new))[0], skip_mass)
    assert share > 0.2 and most <= skip_mass


@pytest.mark.parametrize("skip_mass", [1e-6, 1e-2])
def test_keys_at_the_bound(skip_mass):
    """All keys point along the query, but for its own, which points the other way."""
    args, _ = suite.arrays(suite.Decode(STEEP))
    args = dict(args)
    query = args["query"] = args["query"].copy()
    query[:] = query[:, :, :1]
    direction = query[0, 0, 0] / np.linalg.norm(query[0, 0, 0])
    keys = np.broadcast_to(4 * direction, args["key_cache"].shape).copy()
    keys[:, args["lengths"][0] - 1] *= -1
    args |= {"key_cache": keys, "key_norms": suite.page_norms(keys)}
    share, most = _mass_left_out(args, skip_mass)
    assert share > 0.1 and most <= skip_mass


def test_positive_tau_and_no_mass_to_spare_leave_out_nothing():
    args, _ = suite.arrays(suite.Decode(STEEP))
    share, _ = _mass_left_out(args, 0.0)
    assert share == 0
    share, _ = _mass_left_out(args | {"offset": np.full(4, 0.1, np.float32)}, 1e-2)
    assert share == 0
