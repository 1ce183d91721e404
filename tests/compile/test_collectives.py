import pytest

from lazyattn.compile import collectives, work
from lazyattn.compile.chips import CHIPS
from lazyattn.compile.hlo import Module
from tests.compile.hlo_text import SPARSE_CORE, TEXT, TWO_SLICES
from tests.compile.networks import network


def _two_slices(text=TWO_SLICES):
    slices = network({"data": 2, "fsdp": 4}, (2, 2), "v5e", slices=2)
    return collectives.collect(Module.parse(text), slices)


def test_collectives_of_a_module():
    found = collectives.collect(Module.parse(TEXT), network({"data": 1, "fsdp": 4}, (2, 2, 1)))
    assert not found.unread
    gather, scatter = sorted(found.collectives, key=lambda c: c.kind)
    assert (gather.kind, gather.axes, gather.size, gather.count) == ("all-gather", "fsdp", 4, 3)
    assert gather.wire_bytes == 3 * (2 * 64 * 2) * 3  # three rounds, three other shards
    assert gather.seconds == gather.wire_bytes / 200e9
    # An all-reduce of which each device keeps a part is a reduce-scatter.
    assert (scatter.kind, scatter.count) == ("reduce-scatter", 1)
    assert scatter.wire_bytes == 16 * 64 * 4 * 3 / 4
    assert not gather.gathers and not scatter.gathers


def test_a_gather_by_addition_is_told_apart():
    text = TEXT.replace("all-gather(%slice_fusion)", "all-reduce(%keep_fusion)")
    found = collectives.collect(Module.parse(text), network({"fsdp": 4}, (2, 2, 1)))
    assert [c.gathers for c in found.collectives if c.kind == "all-reduce"] == [True]


def test_bytes_of_each_kind():
    module = Module.parse(TEXT)
    gather, body, _ = next(x for x in module.running() if x[0].name == "all-gather.1")
    share = 2 * 64 * 2
    assert collectives.wire_bytes("all-reduce", gather, body, 4) == 2 * share * 3 / 4
    assert collectives.wire_bytes("all-to-all", gather, body, 4) == share * 3 / 4
    assert collectives.wire_bytes("collective-permute", gather, body, 4) == share


def test_what_a_sparse_core_does():
    module = Module.parse(SPARSE_CORE)
    found = collectives.collect(module, network({"fsdp": 8}, (2, 2, 2), "tpu7x"))
    assert not found.unread
    assert {(c.kind, c.axes, c.size, c.count, c.wire_bytes) for c in found.collectives} == {
        ("all-gather", "fsdp", 8, 1, 8 * 64 * 2 * 7),
        ("reduce-scatter", "fsdp", 8, 1, 64 * 64 * 4 * 7 / 8),
    }
    # Read and written once each, though the text tells it twice.
    gathered, scattered, added = 9 * 8 * 64 * 2, 9 * 8 * 64 * 4, 3 * 64 * 64 * 4
    assert work.count(module, length=1).hbm_bytes == gathered + scattered + added


def test_what_goes_between_slices():
    found = _two_slices()
    assert not found.unread
    between = next(c for c in found.collectives if c.between)
    assert (between.kind, between.axes, between.size, between.count) == ("all-reduce", "data", 2, 3)
    assert between.wire_bytes == 3 * 2 * (16 * 64 * 2) / 2  # both ways of a ring of two
    assert between.seconds == between.wire_bytes / CHIPS["v5e"].network_bandwidth
    # What is numbered 0 to 3 are a slice's own devices; and two equal ones are two.
    inside = {c.kind: c for c in found.collectives if not c.between}
    assert inside["all-reduce"].axes == "fsdp" and inside["all-reduce"].count == 3 + 1
    # A gather is told in three fusions, and made once.
    assert inside["all-gather"].count == 1
    assert inside["all-gather"].wire_bytes == 16 * 64 * 2 * 3


def test_a_gather_of_which_only_the_end_is_seen():
    found = _two_slices(TWO_SLICES.replace("AsyncCollectiveStart", "Another"))
    assert [c.count for c in found.collectives if c.kind == "all-gather"] == [1]


@pytest.mark.parametrize(
    ("before", "after", "unread"),
    [
        ('transfer_type="ALL_REDUCE"', 'transfer_type="ANY"', "3 times send such as send.1"),
        ('target="{1,2}x{0:3}"', 'target="all"', "3 times send such as send.1"),
        ('target="{1,2}x{0:3}"', 'target="{1,7}x{0:3}"', "3 times send such as send.1"),
        (
            "all-reduce(%last), channel_id=4, replica_groups={{0,1,2,3}}",
            "all-reduce(%last), replica_groups=some",
            "1 times all-reduce such as all-reduce.2",
        ),
        (
            "%zero = s32[]{:T(128)} constant(0)",
            '%zero = s32[] custom-call(), custom_call_target="MegascaleAllToAll"',
            "1 times custom-call such as zero",
        ),
        (
            "%zero = s32[]{:T(128)} constant(0)",
            '%zero = s32[] custom-call(), custom_call_target="tpu_custom_call", backend_config='
            '{"custom_call_config":{"has_communication":true}}',
            "1 times custom-call such as zero",
        ),
        (
            "%zero = s32[]{:T(128)} constant(0)",
            "%zero = s32[] ragged-all-to-all(%w.1), replica_groups={{0,1,2,3}}",
            "1 times ragged-all-to-all such as zero",
        ),
        (
            "direction=LT",
            "direction=GE",
            "2 times rounds but the first of a loop of unknown length",
        ),
        (
            "fusion(%w.1), kind=kCustom, calls=%fused_start",
            "spawn(%w.1), kind=kCustom, runs=%fused_start",
            "1 times all-gather in a computation that nothing seems to call",
        ),
    ],
)
def test_what_cannot_be_read_is_said(before, after, unread):
    assert before in TWO_SLICES
    assert _two_slices(TWO_SLICES.replace(before, after)).unread == (unread,)
