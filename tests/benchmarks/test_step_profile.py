import jax
import pytest
from absl import flags

from benchmarks import step_profile, train_step
from benchmarks.step_profile import Event, Part, Rates
from lazyattn import command_line, sharding
from lazyattn.compile import work
from lazyattn.compile.hlo import Module
from lazyattn.errors import InputError
from lazyattn.experiment import from_config_dict
from tests.benchmarks import test_train_step

TINY = [flag for flag in test_train_step.TINY if not flag.startswith("--rounds")]


@pytest.fixture(scope="module")
def module():
    values = flags.FlagValues()
    step_profile.define(["x", *TINY], values)
    command_line.parse(["x", *TINY], values)
    experiment = train_step.with_batch(from_config_dict(values.config), 4, 32, 1)
    mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:1])
    # A program that another test kept may have other names.
    name = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        return Module.parse(train_step.compiled_step("lazy", experiment, mesh).as_text())
    finally:
        jax.config.update(name, before)


def test_every_instruction_that_moves_bytes_has_a_part(module):
    parts, places = step_profile.parts_of(module)
    for name in (step_profile.PRODUCTS, step_profile.LOSS, step_profile.OPTIMIZER):
        assert parts[name].bytes > 0
    whole = work.count(module, 32)
    assert sum(part.bytes for part in parts.values()) == pytest.approx(whole.hbm_bytes)
    assert sum(part.flops for part in parts.values()) == pytest.approx(whole.weight_flops)
    # The output's products, forward and twice backward, and nothing else.
    assert parts[step_profile.LOSS].flops == 3 * 2 * 4 * 32 * 16 * 260
    assert set(places.values()) <= set(step_profile.PARTS)


def _instruction(name, what, where):
    return f'  %{name} = bf16[8,4]{{1,0}} {what}, metadata={{op_name="jit(step)/{where}"}}\n'


def _call(name, target, where):
    return _instruction(name, f'custom-call(%x), custom_call_target="{target}"', where)


HLO = (
    """HloModule m

%moves (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %t = bf16[8,4]{1,0} transpose(%p), dimensions={1,0}
}

%squares (q: bf16[8,4]) -> bf16[8,4] {
  %q = bf16[8,4]{1,0} parameter(0)
  ROOT %m = bf16[8,4]{1,0} multiply(%q, %q)
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
"""
    + _call("kernel", "mosaic_gpu_v2", "attention/lazy_forward/mpmd_map")
    + _call("plan", "triton_kernel_call_ffi", "attention/triton_kernel_call")
    + _call("norm", "triton_kernel_call_ffi", "query_norm/norm_rotate_forward")
    + _call("gemm", "__cublas$gemm", "mlp/dot_general")
    + _instruction("sum", "all-reduce(%gemm)", "transpose(jvp(loss))/psum")
    + _instruction("act", "fusion(%sum), kind=kLoop, calls=%squares", "mlp/mul")
    + _instruction("moved", "fusion(%act), kind=kInput, calls=%moves", "mlp/transpose")
    + "  ROOT %end = bf16[8,4]{1,0} bitcast(%moved)\n}\n"
)


def test_kinds_of_instructions():
    _, places = step_profile.parts_of(Module.parse(HLO))
    assert places == {
        "kernel": step_profile.ATTENTION,
        "plan": step_profile.PLANNING,
        "norm": step_profile.ELEMENTWISE,
        "gemm": step_profile.PRODUCTS,
        "sum": step_profile.COLLECTIVES,
        "act": step_profile.ELEMENTWISE,
        "moved": step_profile.COPIES,
    }


STACK = """HloModule s

%write (p0: f32[100,4], p1: f32[1,4], p2: s32[]) -> f32[100,4] {
  %p0 = f32[100,4]{1,0} parameter(0)
  %p1 = f32[1,4]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %c = s32[] constant(0)
  ROOT %d = f32[100,4]{1,0} dynamic-update-slice(%p0, %p1, %p2, %c)
}

ENTRY %main (a: f32[100,4], b: f32[1,4], i: s32[]) -> f32[100,4] {
  %a = f32[100,4]{1,0} parameter(0)
  %b = f32[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %s = ((f32[100,4]{1,0}, f32[1,4]{1,0}, s32[]), f32[100,4]{1,0}, u32[]) \
fusion-start(%a, %b, %i), kind=kLoop, calls=%write
  ROOT %e = f32[100,4]{1,0} fusion-done(%s)
}
"""


def test_a_write_into_a_stack_counts_what_it_writes():
    parts, places = step_profile.parts_of(Module.parse(STACK))
    assert places == {"s": step_profile.COPIES}
    assert parts[step_profile.COPIES].bytes == 16 + 16 + 4


def test_what_moves_most_comes_first():
    rows = step_profile.largest(Module.parse(HLO), 2)
    assert rows[0] == (step_profile.ATTENTION, "jit(step)/attention/lazy_forward/mpmd_map", 1, 128)
    assert len(rows) == 2


def test_times_are_those_of_a_step_and_gaps_count_once():
    parts, places = step_profile.parts_of(Module.parse(HLO))
    ms = 1e6
    events = [
        Event("kernel", "k", 0, 4 * ms),
        Event("act", "loop", 3 * ms, 5 * ms),  # on another stream
        Event("", "memset", 6 * ms, 7 * ms),
        Event("gemm", "g", 9 * ms, 12 * ms),
    ]
    unknown = step_profile.add_times(parts, places, events, steps=2)
    assert parts[step_profile.ATTENTION].ms == 2
    assert parts[step_profile.ELEMENTWISE].ms == 1.5
    assert parts[step_profile.PRODUCTS].ms == 1.5
    assert parts[step_profile.GAPS].ms == 1.5
    assert unknown == {"memset": 0.5}


def test_the_least_time_is_the_longer_of_bytes_and_products():
    rates = Rates(bytes=1e12, flops=1e15)
    assert Part(bytes=1e9, flops=1e11).least(rates) == 1
    assert Part(bytes=1e8, flops=1e12).least(rates) == 1
    lines = step_profile.table({"loss": Part(2.0, 1e9, 1e12)}, rates).splitlines()
    assert lines[2] == "| loss | 2.00 | 1.00 | 1,000 | 1.00 |"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=0"], "--steps is 0, but it must be at least 1"),
        (["--attention=linear"], "--attention is 'linear', but it must be lazy, biased"),
        ([], "--compile_only is False, but it must be given without a GPU"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    if jax.default_backend() == "gpu" and not arguments:
        pytest.skip("there is a GPU")
    values = flags.FlagValues()
    argv = ["x", *TINY, *arguments]
    step_profile.define(argv, values)
    command_line.parse(argv, values)
    with pytest.raises(InputError) as error:
        step_profile._run(values)
    assert str(error.value).startswith(message)
