import jax
import jax.numpy as jnp
import pytest

from benchmarks import cases, planning

_PROGRAM = """HloModule jit_once

%fused (p: f32[4]) -> f32[4] {
  ROOT %add = f32[4]{0} add(%p, %p)
}

ENTRY %main (p: f32[4]) -> (f32[4], s32[4]) {
  %p = f32[4]{0} parameter(0)
  %sum = (f32[4]{0}, f32[4]{0}) fusion(%p), kind=kLoop, calls=%fused
  %first = f32[4]{0} get-tuple-element(%sum), index=0
  %found = s32[4]{0} custom-call(%first), custom_call_target="triton"
  ROOT %all = (f32[4]{0}, s32[4]{0}) tuple(%first, %found)
}
"""


def test_what_launches_is_counted_in_the_entry_alone():
    assert planning.launches(_PROGRAM) == 2


def test_a_line_has_planning_over_training():
    line = planning.Line("1x2x64x64", "alibi", 1, "xla", 3, (0.5, 0.4, 0.6), (10.0, 9.0, 11.0))
    assert line.share == 0.05
    assert str(line).endswith("| xla | 3 | 0.5000 | 10.000 | 0.050 |")


@pytest.mark.slow
@pytest.mark.parametrize("documents", [1, 4])
def test_planning_many_times_finds_what_once_does(documents):
    planning.FLAGS.mark_as_parsed()
    shape = cases.Shape.parse("1x2x512x64")
    parameters = cases.parameters("alibi", shape, 100)
    tensors = cases.tensors(shape, "bfloat16", 0)
    plans = planning.Planning("xla")
    args = (tensors, parameters, planning.segment_ids(shape, documents))
    kinds = jax.eval_shape(plans.leftovers, *args)
    leftovers = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), kinds)
    once, many = jax.jit(plans.once)(*args, leftovers), jax.jit(plans.many)(*args, leftovers)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, once, many))
    visits = once[1]
    assert int(visits.first.max()) == (6 if documents > 1 else 0)
