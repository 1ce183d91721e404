"""Options, and what is known of a call."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import problem
from tests.pallas_kernels.problems import problem as small


def test_options_hold_inside_their_context():
    assert problem.current_options() == problem.Options()
    with problem.options(skip_dead=False):
        with problem.options(planner="xla"):
            assert problem.current_options() == problem.Options(skip_dead=False, planner="xla")
        assert problem.current_options() == problem.Options(skip_dead=False)
    assert problem.current_options() == problem.Options()


def test_jax_traces_anew_under_other_options():
    traced = []

    @jax.jit
    def double(x):
        traced.append(problem.current_options().skip_dead)
        return 2 * x

    double(jnp.ones(2))
    with problem.options(skip_dead=False):
        double(jnp.ones(2))
    double(jnp.ones(2))
    assert traced == [True, False]


def test_facts_make_a_plan_and_leave_out_what_a_plan_adds():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Plan(problem.Problem):
        tile: int

    call = small(width=7, skip_dead=False)
    plan = Plan(**call.facts(), tile=64)
    assert plan.facts() == call.facts()
    assert (
        plan.has_bias and not plan.skip_dead and hash(plan) == hash(Plan(**call.facts(), tile=64))
    )
