import jax
import jax.numpy as jnp
import pytest

from lazyattn.compile import collectives, memory, work
from lazyattn.compile.hlo import Module
from tests.compile.hlo_text import TEXT
from tests.compile.networks import network

MODULE = Module.parse(TEXT)


def _by_name(name):
    return next(found for found in MODULE.running() if found[0].name == name)


def test_what_runs_and_how_often():
    times = {instruction.name: times for instruction, _, times in MODULE.running()}
    assert MODULE.entry == "main"
    assert times["while.1"] == 1 and times["product_fusion"] == 3
    assert "convolution.1" not in times  # inside a fusion
    inside = MODULE.inside(_by_name("product_fusion")[0])
    assert [part.opcode for part, _ in inside] == ["parameter", "parameter", "convolution"]


@pytest.mark.parametrize(
    ("before", "after", "rounds"),
    [
        ("constant(3)", "constant(10)", 10),
        ("%constant.4 = s32[]{:T(128)} constant(1)", "%constant.4 = s32[] constant(2)", 2),
        ("%zero = s32[]{:T(128)} constant(0)", "%zero = s32[] constant(1)", 2),
        ("direction=LT", "direction=GE", 1),  # not a loop that counts up
    ],
)
def test_rounds_of_a_loop(before, after, rounds):
    assert before in TEXT
    module = Module.parse(TEXT.replace(before, after))
    loop, owner, _ = next(found for found in module.running() if found[0].opcode == "while")
    assert module.trip_count(loop, owner) == rounds
    unknown = after == "direction=GE"
    assert (module.rounds(loop, owner) is None) == unknown
    assert work.count(module, length=16).unread_loops == unknown


@pytest.mark.parametrize(("scope", "counted"), [("fetch_3", 1), ("other", 2)])
def test_of_ways_to_fetch_that_of_everything_counts(scope, counted):
    way = (
        "%{0} (p: f32[2]) -> f32[2] {{\n  %p{0} = f32[2] parameter(0)\n"
        "  ROOT %r{0} = f32[2] all-gather(%p{0}), replica_groups={{{{0,1}}}}\n}}\n"
    )
    module = Module.parse(
        way.format("near") + way.format("far") + "ENTRY %main (i: s32[]) -> f32[2] {\n"
        "  %i = s32[] parameter(0)\n  %x = f32[2] constant({0, 0})\n"
        "  ROOT %r = f32[2] conditional(%i, %x, %x), branch_computations={%near, %far},"
        f' metadata={{op_name="jit(f)/jvp({scope})/cond"}}\n}}\n'
    )
    (ran,) = {owner.name for _, owner, _ in module.running() if owner.name not in ("main", "near")}
    assert ran == "far"
    found = collectives.collect(module, network({"sequence": 2}, (2, 1)))
    assert [one.count for one in found.collectives] == [counted] and not found.unread


def test_arrays_and_where_they_lie():
    gathered, _, _ = _by_name("all-gather.1")
    assert gathered.arrays[0].shape == (1, 8, 64) and gathered.bytes == 1024
    assert gathered.hbm_bytes == 0
    assert [array.dtype for array in _by_name("while.1")[0].arrays] == [
        "s32",
        "bf16",
        "f32",
        "bf16",
    ]


def test_work_by_hand():
    done = work.count(MODULE, length=16)
    assert done.weight_flops == 3 * 2 * 16 * 8 * 64
    assert done.kernel_calls == {"lazy_forward": 1, "lazy_backward": 1}
    # Four products and five over 8.5 visible keys of each of 2 x 4 x 16 queries of size 8,
    # though there is but one head of keys.
    assert done.attention_flops == (4 + 5) * 2 * (2 * 4 * 8 * 16) * 8.5

    def moved(name):
        instruction, computation, _ = _by_name(name)
        return work.hbm_bytes(instruction, computation, MODULE)

    assert moved("slice_fusion") == 2 * 64 * 4 + 4 + 2 * 64 * 2  # a layer read, and written
    assert moved("product_fusion") == 16 * 8 * 2 + 16 * 64 * 2  # the weight is on the chip
    assert moved("keep_fusion") == 4 + 16 * 8 * 2 + 16 * 8 * 2  # in place
    assert moved("all-gather.1") == 2 * 64 * 2
    assert moved("while.1") == moved("whole") == 0


def test_what_the_loop_over_layers_writes():
    assert memory.stacked_bytes(MODULE, layers=3) == memory.Stacked(3 * 16 * 8 * 2, 0)
    assert memory.stacked_bytes(MODULE, layers=4) == memory.Stacked(0, 0)
    backward = Module.parse(TEXT.replace("jvp(Transformer)/while", "transpose(jvp())/while"))
    assert memory.stacked_bytes(backward, layers=3) == memory.Stacked(0, 3 * 16 * 8 * 2)


def test_a_module_of_this_machine():
    """Products and rounds are read from what XLA writes for a CPU, too."""

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    x, weights = jnp.zeros((4, 16)), jnp.zeros((5, 16, 16))
    text = jax.jit(jax.grad(layers, argnums=1)).lower(x, weights).compile().as_text()
    done = work.count(Module.parse(text), length=1)
    assert done.weight_flops == 3 * 5 * 2 * 4 * 16 * 16
    assert done.attention_flops == 0 and done.hbm_bytes > 0
