from lazyattn.compile.chips import CHIPS
from tests.compile.networks import network


def test_axes_and_rates_of_a_group():
    whole = network({"data": 4, "fsdp": 4, "tensor": 8}, (4, 4, 8))
    assert whole.axes([0, 1]) == "tensor" and whole.axes([0, 8, 16, 24]) == "fsdp"
    assert whole.axes(range(128)) == "data+fsdp+tensor" and whole.axes([3]) == ""
    link = 100e9
    assert whole.bandwidth([0, 8, 16, 24]) == 2 * link  # a ring of four
    assert whole.bandwidth([0, 8]) == link  # half of that ring
    assert whole.bandwidth(range(128)) == 6 * link
    small = network({"data": 2, "fsdp": 8}, (2, 2, 4))  # too small for rings
    assert small.bandwidth([0, 1, 2, 3]) == link and small.bandwidth(range(16)) == 3 * link


def test_rates_of_a_line_and_of_a_network():
    line = network({"fsdp": 8}, (8, 1), "v5e")
    assert line.bandwidth(range(8)) == 50e9  # only sixteen make a ring
    assert network({"fsdp": 16}, (16, 1), "v5e").bandwidth(range(16)) == 100e9
    slices = network({"data": 2, "fsdp": 16}, (4, 4), "v6e", slices=2)
    assert slices.bandwidth([0, 16]) == CHIPS["v6e"].network_bandwidth
    assert slices.bandwidth(range(16)) == 2 * 100e9


def test_devices_of_a_slice_and_of_a_program():
    slices = network({"data": 2, "fsdp": 4}, (2, 2), "v5e", slices=2)
    assert slices.between([0, 4]) and not slices.between([4, 7])
    assert slices.program(4) == [0, 1, 2, 3] and slices.program(8) == list(range(8))
    assert slices.named([100003, 200001]) == [3, 5] and slices.named([100004, 300000]) == []
