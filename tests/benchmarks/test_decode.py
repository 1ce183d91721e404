"""The decode benchmark: its plan, the heads it takes from files, and a small run."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from benchmarks import timing
from benchmarks.decode import heads, plan
from benchmarks.decode.attention import Attention
from benchmarks.decode.token import Token
from lazyattn.errors import InputError

STUDY = pathlib.Path(heads.__file__).parents[1] / "results" / "study.jsonl"
SHAPE = heads.Shape(layers=2, heads=4, kv_heads=2, head_dim=16, table=64)


def test_plan_has_every_point_and_begins_with_what_must_be_reached():
    points = {point for wave in plan.PLAN for point in wave.points}
    for context in (4096, 16_384, 32_768, 131_072):
        assert {plan.Point(context, batch) for batch in (1, 8, 64)} <= points
    first, second = plan.PLAN[:2]
    assert plan.Point(32_768, 16) in first.points and plan.Point(4096, 8) in first.points
    assert set(first.tokens) == {"softmax-full", "lazy-spans"}
    assert "softmax-full" in second.tokens
    for wave in plan.PLAN:
        assert set(wave.tokens) <= set(wave.cases) <= set(plan.CASES)


def test_points_and_cases_choose():
    (wave,) = plan.chosen(["4096xmax"], ["torch", "lazy-spans"])
    assert wave.points == (plan.Point(4096, None),) and wave.tokens == ("lazy-spans",)
    (wave,) = plan.chosen(["4096x8+1024x1"], ["torch"])
    assert wave.points == (plan.Point(4096, 8), plan.Point(1024, 1)) and wave.tokens == ()
    waves = plan.chosen([], ["trained-spans"])
    assert [wave.cases for wave in waves] == [("trained-spans",)]
    for points, cases, words in ((["4096"], [], "4096x|32768x16"), ([], ["fast"], "be of softmax")):
        with pytest.raises(InputError, match=words):
            plan.chosen(points, cases)


def test_heads_of_the_study_are_taken_in_turn():
    line = heads._line(STUDY, "sharp_qk_norm")
    slopes = np.asarray(line["slopes"], np.float32)
    shape = dataclasses.replace(SHAPE, layers=6, heads=16, kv_heads=16)
    found = heads.trained(STUDY, "sharp_qk_norm", shape, 3)
    own = found.attention["distance_slope"]
    step = len(slopes) // 3
    np.testing.assert_array_equal(own[1, ::2], slopes[step])
    np.testing.assert_array_equal(own[:3], own[3:])
    np.testing.assert_array_equal(own[:, ::2], own[:, 1::2])
    np.testing.assert_allclose(found.attention["distance_bias"][0, :, 5], -5 * own[0], rtol=1e-6)
    with pytest.raises(InputError, match="sharp_qk_norm_steady"):
        heads.trained(STUDY, "none", shape, 3)


def test_heads_of_a_file_have_its_table_and_bound(tmp_path):
    table = -np.arange(32.0) * np.asarray([0.5, 0.25])[:, None] + np.sin(np.arange(32))
    path = tmp_path / "model.npz"
    np.savez(path, bias=table[None], tau=[[-1.0, -0.5]], score_bound=[9.0])
    found = heads.trained(path, "", SHAPE, 4)
    assert found.distinct == 1 and found.score_bound == pytest.approx(9, rel=1e-5)
    own = found.attention["distance_bias"]
    np.testing.assert_allclose(own[1, 2, :32], table[1], rtol=1e-5)
    fall = own[0, 0, 40] - own[0, 0, 41]
    assert fall == pytest.approx(found.attention["distance_slope"][0, 0], rel=1e-4)
    np.savez(path, bound=[9.0])
    with pytest.raises(InputError, match="slopes and offsets"):
        heads.trained(path, "", SHAPE, 4)


def test_breakdown_adds_kernels_of_a_name_and_the_gaps_between():
    ran = [
        timing.Kernel("dense_3", 0, 2e6, "96,1,1"),
        timing.Kernel("combine", 3e6, 4e6),
        timing.Kernel("dense_4", 3.5e6, 6e6, "96,1,1"),
        timing.Kernel("combine", 8e6, 9e6),
    ]
    found = timing.breakdown(ran, calls=2)
    assert found["kernels"] == {"dense 96,1,1": [1, 2.25], "combine": [1, 1]}
    assert found["runs"] == 2 and found["busy_ms"] == 3.25 and found["gap_ms"] == 1.5


def _line(case, own, batch=2, context=300):
    attention, cache, implementation = plan.CASES[case]
    return plan.Line(implementation, attention, cache, own.name, context, batch)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["softmax-full", "trained-spans"])
def test_small_run(case):
    softmax = case == "softmax-full"
    own = heads.softmax(SHAPE) if softmax else heads.trained(STUDY, "sharp_qk_norm", SHAPE, 2)
    line = _line(case, own)
    job = Attention(line, own, own.plan(line.cache, line.context), calls=2)
    token = Token(line, own, job.plan, calls=2, rounds=1)
    job.compile()
    token.compile()
    job.measure(job.inputs(), rate=1e9, rounds=1)
    token.measure(rate=1e9)
    assert line.ms_attention > 0 and line.ms_token > 0 and line.largest_batch > 1000
    assert line.bytes > line.bytes_attention > 0
    if softmax:
        assert line.read_share == 1
    else:
        assert job.held < job.whole and 0 < line.read_share < 1
    json.dumps(dataclasses.asdict(line))


def test_cache_that_does_not_fit_is_said():
    own = heads.alibi(SHAPE)
    line = _line("lazy-full", own, batch=10**9)
    with pytest.raises(MemoryError, match="the cache takes"):
        Token(line, own, own.plan("full", 300), calls=1, rounds=1).compile()
