"""`train.py --mode=compile` as a user runs it; with libtpu where it is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lazyattn.compile import libtpu

ROOT = Path(__file__).parents[2]
SMALL = (
    *("--config.model.width=256", "--config.model.num_layers=3", "--config.model.vocab_size=512"),
    *("--config.model.attention.num_heads=4", "--config.data.sequence_length=512"),
    *("--config.data.batch_size=8", "--config.data.vocab_size=512"),
)
needs_libtpu = pytest.mark.skipif(
    libtpu.library() is None, reason="there is no libtpu; `make libtpu` gets it"
)


def _compile(*arguments, config="lazy_340m_10b", **environment):
    found = subprocess.run(
        [sys.executable, "train.py", "--mode=compile", f"--config={config}", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )
    return found.returncode, found.stdout, found.stderr


def _times(out, kind, axis):
    """How often the report says that a kind of collective runs over an axis."""
    return sum(
        int(found) for found in re.findall(rf"^  {kind} +over {axis} +(\d+) times", out, re.M)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            [], "--topology is not given, but --mode=compile needs one", marks=pytest.mark.slow
        ),
        (["--topology=v9:2x2"], "--topology is 'v9', but it must be of one of v4, v5e, v5p, v6e"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message):
    status, out, err = _compile(*arguments)
    assert status == 2 and out == ""
    assert err.startswith(message) and err.count("\n") == 1


def test_gpus_by_estimate():
    status, out, err = _compile("--topology=h100:8")
    assert status == 0, err
    assert "fits" in out and "estimated by formula" in out


@pytest.mark.slow
def test_this_machine_as_eight_devices():
    status, out, err = _compile("--topology=cpu:8", "--config.mesh.tensor=2", *SMALL)
    assert status == 0, err
    assert "8 devices as fsdp 4, tensor 2" in out and "attention xla_chunked" in out
    assert "fits" in out and "compiled     in" in out and "MFU" not in out
    status, _, err = _compile("--topology=cpu:8", "--config.mesh.tensor=3", *SMALL)
    assert status == 2 and err.startswith("mesh is ")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chips", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_a_small_step_for_every_generation(chips):
    status, out, err = _compile(f"--topology={chips}", *SMALL)
    assert status == 0, err
    assert "fits" in out and "attention tpu" in out
    assert "MFU" in out
    assert _times(out, "all-gather", "fsdp") == 44  # seven a layer, forward and backward; two
    assert _times(out, "reduce-scatter", "fsdp") >= 3  # some generations scatter several at once
    assert "NOT COUNTED" not in out and "lower bound" not in out


@needs_libtpu
@pytest.mark.slow
def test_two_slices_and_what_a_tpu_kernel_cannot_do():
    status, out, err = _compile(
        "--topology=2*v5e:2x2",
        *SMALL,
        *("--config.mesh.data=2", "--config.mesh.fsdp=4"),
        config="ablations/renormalized",
    )
    assert status == 0, err
    assert "attention xla_chunked" in out
    # What this attention skips depends on the data, and so do the lengths of its loops.
    assert "loops whose length depends on the data" in out and "compute and HBM are a lower" in out
    assert "in a form that is not read" not in out and "network's part" not in out
    assert _times(out, "all-reduce", "data") > 0
    assert all("(between slices)" in line for line in out.splitlines() if "over data " in line)
    assert not any("(between slices)" in line for line in out.splitlines() if "over fsdp " in line)


@needs_libtpu
@pytest.mark.slow
def test_parameters_over_two_slices():
    status, out, err = _compile(
        "--topology=2*v5e:2x2", *SMALL, "--config.mesh.data=1", "--config.mesh.fsdp=8"
    )
    assert status == 0, err
    assert "NOT COUNTED" not in out
    between = [line for line in out.splitlines() if "(between slices)" in line]
    assert {line.split()[0] for line in between} == {"all-gather", "all-reduce", "reduce-scatter"}
    assert _times("\n".join(between), "all-gather", "fsdp") == 44


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_says_what_would():
    status, out, err = _compile("--topology=v5e:2x2", "--config.model.remat=none")
    assert status == 1, err
    assert "DOES NOT FIT" in out and "--config.model.remat=full" in out
    assert "--config.training.microbatches=2" in out
