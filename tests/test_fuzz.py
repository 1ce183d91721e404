"""A few fixed programs of the fuzz program, and that it would notice a fault."""

import jax
import numpy as np
import pytest

from tests import fuzz, fuzz_definition, oracle
from tests.naive import naive_attention

# One of each way to run it that needs no more than one device; small, since compiling takes time.
SEEDS = (0, 4, 6, 10, 17, 26)


@pytest.mark.parametrize("implementation", ["xla", "xla_chunked"])
@pytest.mark.parametrize(
    "seed", [x if x in (0, 4, 6) else pytest.param(x, marks=pytest.mark.slow) for x in SEEDS]
)
def test_fixed_seeds(seed, implementation):
    program = fuzz.draw(seed, most_devices=1)
    calls, wrong = fuzz.check_program(program, implementation, 3)
    assert calls == 3 and not wrong, (program, wrong)


def test_definition_is_the_row_by_row_one():
    for case in oracle.CASES[:5] + [case for case in oracle.CASES if case.name == "renormalized"]:
        if case.shape[1] > 200:
            continue
        args = oracle.inputs(case)
        d_out = np.ones(args["query"].shape)
        true = fuzz_definition.truth(args, d_out, 1e-7)
        np.testing.assert_allclose(true.results["out"], naive_attention(**args)[0], atol=1e-12)


def test_gradients_are_finite_differences():
    rng = np.random.default_rng(0)
    shape = {"query": (1, 9, 2, 3), "key": (1, 9, 1, 3), "value": (1, 9, 1, 3)}
    shape |= {"distance_bias": (2, 4), "distance_slope": (2,), "offset": (2,)}
    args = {name: rng.standard_normal(size) for name, size in shape.items()}
    args["offset"] = np.array([-0.7, 0.4])
    args["segment_ids"] = np.array([[0, 0, 0, 0, 0, 0, 1, 1, 1]])
    d_out = rng.standard_normal(shape["query"])
    for settings in ({}, {"renormalize": True}, {"window": 3, "scale": -0.3}):
        call = args | settings
        true = fuzz_definition.truth(call, d_out, 1e-9)
        assert not true.unsure.any()
        for name in shape:
            direction = rng.standard_normal(shape[name])
            ahead, behind = (
                fuzz_definition.truth(call | {name: args[name] + step * direction}, d_out, 1e-9)
                for step in (1e-6, -1e-6)
            )
            slope = np.vdot(d_out, ahead.results["out"] - behind.results["out"]) / 2e-6
            assert abs(slope - np.vdot(true.results[name], direction)) < 1e-6 * (1 + abs(slope))


@pytest.mark.parametrize("name", ["out", "query", "value", "offset"])
def test_a_fault_is_noticed(name):
    program = fuzz.draw(19, most_devices=1)
    assert program.dtype == "bfloat16" and program.width and program.offset
    arrays, d_out = fuzz.values(program, 0)
    true = fuzz_definition.truth(arrays | dict(program.options), d_out, 1e-7)
    found = {
        x: np.asarray(y, arrays["query" if x == "out" else x].dtype)
        for x, y in true.results.items()
    }
    assert not fuzz.errors_of(program, jax.tree.map(jax.numpy.asarray, found), arrays, true)
    found[name] = found[name] * np.asarray(1.1, found[name].dtype)
    wrong = fuzz.errors_of(program, jax.tree.map(jax.numpy.asarray, found), arrays, true)
    assert len(wrong) == 1 and wrong[0].startswith(name), wrong


def test_help_and_flags_that_there_are_not(capsys):
    with pytest.raises(SystemExit) as end:
        fuzz._read_flags(["fuzz", "--help"])
    assert end.value.code == 0
    assert "--programs: Programs to draw." in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        fuzz._read_flags(["fuzz", "--program=3"])
    assert end.value.code == 2
    assert "'program'" in capsys.readouterr().err
