import numpy as np
import pytest

from lazyattn.ahead_of_time import collectives
from lazyattn.ahead_of_time.chips import CHIPS
from lazyattn.ahead_of_time.collectives import Network, first_group
from lazyattn.ahead_of_time.hlo import Module
from tests.ahead_of_time.hlo_text import TEXT


def _network(axis_sizes, shape, chip="v5p", slices=1):
    places = np.stack(np.meshgrid(*map(np.arange, (slices, *shape)), indexing="ij"), -1)
    rows = places.reshape(-1, len(shape) + 1)
    return Network(axis_sizes, np.roll(rows, -1, axis=1), shape, CHIPS[chip])


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [0, 2]),
        ("replica_groups=[2,4]<=[8], x", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [0, 4]),
        ("replica_groups=mesh['axis_0'=4] {'axis_0'}, x", [0, 1, 2, 3]),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'fsdp'}, x", [0, 2, 4, 6]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}, x", list(range(8))),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}, x", [0, 4]),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(4)2}, x", [0, 1]),
        ("channel_id=1, source_target_pairs={{0,1},{1,2}}, x", [0, 1]),
        ("nothing of the kind", []),
    ],
)
def test_groups_in_every_notation(text, group):
    assert first_group(text) == group


def test_axes_and_rates_of_a_group():
    network = _network({"data": 4, "fsdp": 4, "tensor": 8}, (4, 4, 8))
    assert network.axes([0, 1]) == "tensor" and network.axes([0, 8, 16, 24]) == "fsdp"
    assert network.axes(range(128)) == "data+fsdp+tensor" and network.axes([3]) == ""
    link = 100e9
    assert network.bandwidth([0, 8, 16, 24]) == 2 * link  # a ring of four
    assert network.bandwidth([0, 8]) == link  # half of that ring
    assert network.bandwidth(range(128)) == 6 * link
    small = _network({"data": 2, "fsdp": 8}, (2, 2, 4))  # too small for rings
    assert small.bandwidth([0, 1, 2, 3]) == link and small.bandwidth(range(16)) == 3 * link


def test_rates_of_a_line_and_of_a_network():
    line = _network({"fsdp": 8}, (8, 1), "v5e")
    assert line.bandwidth(range(8)) == 50e9  # only sixteen make a ring
    assert _network({"fsdp": 16}, (16, 1), "v5e").bandwidth(range(16)) == 100e9
    slices = _network({"data": 2, "fsdp": 16}, (4, 4), "v6e", slices=2)
    assert slices.bandwidth([0, 16]) == CHIPS["v6e"].network_bandwidth
    assert slices.bandwidth(range(16)) == 2 * 100e9


def test_collectives_of_a_module():
    found = collectives.collect(Module.parse(TEXT), _network({"data": 1, "fsdp": 4}, (2, 2, 1)))
    gather, scatter = sorted(found, key=lambda c: c.kind)
    assert (gather.kind, gather.axes, gather.size, gather.count) == ("all-gather", "fsdp", 4, 3)
    assert gather.wire_bytes == 3 * (2 * 64 * 2) * 3  # three rounds, three other shards
    assert gather.seconds == gather.wire_bytes / 200e9
    # An all-reduce of which each device keeps a part is a reduce-scatter.
    assert (scatter.kind, scatter.count) == ("reduce-scatter", 1)
    assert scatter.wire_bytes == 16 * 64 * 4 * 3 / 4
    assert not gather.gathers and not scatter.gathers


def test_a_gather_by_addition_is_told_apart():
    text = TEXT.replace("all-gather(%slice_fusion)", "all-reduce(%keep_fusion)")
    found = collectives.collect(Module.parse(text), _network({"fsdp": 4}, (2, 2, 1)))
    assert [c.gathers for c in found if c.kind == "all-reduce"] == [True]


def test_bytes_of_each_kind():
    module = Module.parse(TEXT)
    gather, body, _ = next(x for x in module.running() if x[0].name == "all-gather.1")
    share = 2 * 64 * 2
    assert collectives.wire_bytes("all-reduce", gather, body, 4) == 2 * share * 3 / 4
    assert collectives.wire_bytes("all-to-all", gather, body, 4) == share * 3 / 4
    assert collectives.wire_bytes("collective-permute", gather, body, 4) == share
