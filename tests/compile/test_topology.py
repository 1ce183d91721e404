import pytest

from lazyattn.compile import libtpu, topology
from lazyattn.errors import InputError


@pytest.mark.parametrize(
    ("text", "chips", "devices"),
    [
        ("v5p:8x8x8", 512, 512),
        ("v5e:16x16", 256, 256),
        ("2*v6e:16x16", 512, 512),
        ("v4:2x2x1", 4, 4),
        ("TPU7x:2x2x1", 4, 8),
        ("h100:64", 64, 64),
        ("h200:8", 8, 8),
        ("b200:8", 8, 8),
        ("a100:16", 16, 16),
        ("cpu:8", 8, 8),
    ],
)
def test_names(text, chips, devices):
    found = topology.parse(text)
    assert (found.chips, found.devices) == (chips, devices)
    assert str(found) == text.lower()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5p", r"--topology is 'v5p', but it must be a chip \(v4, v5e, v5p, v6e, tpu7x, h100, h"),
        ("v9:2x2", "--topology is 'v9', but it must be of one of v4, v5e, v5p, v6e, tpu7x, h100"),
        ("v5p:2x2", "--topology is 'v5p:2x2', but it must be three sizes, as v5p:4x4x4"),
        ("v5e:2x2x1", "but it must be two sizes, as v5e:4x4"),
        ("h100:8x8", "but it must be a number of devices, as h100:64"),
        ("cpu:2x2", "but it must be a number of devices, as cpu:64"),
        ("2*cpu:2", "one slice, since cpu's network is unknown"),
        ("v5e:16x32", "a slice of at most 256 chips; join several, as 2"),
        ("v6e:0x4", "but it must be two sizes"),
        ("2*v4:2x2x1", "one slice, since v4's network is unknown"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(InputError, match=message) as caught:
        topology.parse(text)
    assert "\n" not in str(caught.value)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(libtpu, "library", lambda: None)
    with pytest.raises(InputError, match="--mode=compile needs libtpu, the TPU compiler, which is"):
        topology.devices(topology.parse("v5p:2x2x1"))


def test_libtpu_as_named(monkeypatch):
    monkeypatch.setenv("TPU_LIBRARY_PATH", "somewhere/libtpu.so")
    assert str(libtpu.library()) == "somewhere/libtpu.so"
