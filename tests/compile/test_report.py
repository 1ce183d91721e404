"""The report, its suggestions and the estimate for GPUs."""

import dataclasses
import math

import jax
import pytest

from lazyattn.compile import compiler, estimate, main, report, topology
from lazyattn.compile.chips import CHIPS
from lazyattn.compile.collectives import Collective
from lazyattn.compile.roofline import roofline
from lazyattn.compile.suggestions import suggest
from lazyattn.errors import InputError
from lazyattn.experiment import check_override, from_config_dict
from lazyattn.model.accounting import flops_per_token
from lazyattn.recipes import recipe
from lazyattn.training import step_memory
from lazyattn.training.metrics import PEAK_FLOPS

EIGHT = topology.parse("h100:8")


def _experiment(size="340m", **changes):
    config = recipe(size, "10b", "sharp")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return from_config_dict(config)


@pytest.fixture(scope="module")
def small():
    return estimate.estimate(_experiment(), EIGHT)


def test_the_state_is_exact(small):
    assert small.state.parameters == pytest.approx(4 * small.parameters / 8, rel=1e-2)
    assert small.state.optimizer == pytest.approx(2 * small.state.parameters, rel=1e-6)


def test_remat_keeps_what_enters_a_block():
    model = _experiment().model
    full = step_memory.kept_bytes(model, 2, 4096)
    stream = model.num_layers * 2 * 4096 * model.width * 2
    assert stream < full < 1.5 * stream
    none = step_memory.kept_bytes(dataclasses.replace(model, remat="none"), 2, 4096)
    assert none > 8 * full


def test_products_are_those_of_the_model_and_what_is_done_again(small):
    experiment, tokens = _experiment(), 524_288 / 8
    once = flops_per_token(experiment.model, 4096)
    assert once.training * tokens < 3 * once.forward * tokens * 1.001
    assert 3 * once.weights * tokens < small.traffic.weight_flops < 4 * once.weights * tokens
    none = estimate.estimate(_experiment(model__remat="none"), EIGHT).traffic
    assert none.weight_flops == 3 * once.weights * tokens
    # Forward four products and backward five, where softmax has two and four.
    assert none.attention_flops == pytest.approx(9 / 2 * once.attention * tokens)


def test_what_fits_and_what_does_not(small):
    assert small.fits and not small.compiler_gave_up
    large = estimate.estimate(_experiment(model__remat="none"), EIGHT)
    assert not large.fits and large.needed > large.available
    told = "\n".join(report.lines(large))
    assert "DOES NOT FIT" in told and "It does not fit. Try" in told
    assert "--config.model.remat=full" in told and "--config.training.microbatches=2" in told


def test_the_report_says_all_it_must(small):
    told = "\n".join(report.lines(small))
    for words in (
        "topology     h100:8: 8 chips, 8 devices as fsdp 8",
        "374,261,504 parameters, 524,288 tokens, 1 microbatch, remat full",
        "nothing: all below is estimated by formula",
        "parameters ",
        "optimiser ",
        "activations kept for the backward pass",
        "TFLOP a step and device",
        "GB read and written",
        "all-gather         over fsdp",
        "step time",
        "MFU",
        "assumed      products of any shape at the chip's peak rate",
        "NVIDIA H100 SXM data sheet",
    ):
        assert words in told
    assert not any(len(line) > 120 for line in report.lines(small))


def test_what_could_not_be_read_makes_the_times_a_lower_bound(small):
    assert "lower bound" not in "\n".join(report.lines(small))
    traffic = dataclasses.replace(small.traffic, unread=("3 times send such as send.1",))
    told = report.lines(dataclasses.replace(small, traffic=traffic))
    said = next(i for i, line in enumerate(told) if "NOT COUNTED" in line)
    assert told[said].endswith("in a form that is not read: 3 times send such as send.1")
    roof = next(i for i, line in enumerate(told) if line.startswith("roofline"))
    assert said < roof and "the network's part is a lower bound" in told[roof + 1]
    assert not any(len(line) > 120 for line in told)


def test_loops_of_unknown_length_make_the_work_a_lower_bound(small):
    traffic = dataclasses.replace(small.traffic, unread_loops=2)
    told = "\n".join(report.lines(dataclasses.replace(small, traffic=traffic)))
    assert "NOT COUNTED: all but one round of each of 2 loops whose length depends on" in told
    assert "compute and HBM are a lower bound, and so are both step times" in told
    assert "network's part" not in told


def test_what_goes_between_slices_is_marked(small):
    first = dataclasses.replace(small.traffic.collectives[0], between=True)
    traffic = dataclasses.replace(small.traffic, collectives=(first,))
    told = report.lines(dataclasses.replace(small, traffic=traffic))
    assert [line for line in told if line.endswith("(between slices)")]


def test_products_in_float8_are_refused():
    with pytest.raises(InputError, match=r"^training.quantization is 'fp8', but it must be 'none'"):
        main.compile_report(_experiment(training__quantization="fp8"), "h100:8")


def test_the_exit_status(monkeypatch, capsys):
    before = jax.config.jax_platforms
    try:
        assert main.compile_report(_experiment(), "h100:8") == 0
        assert main.compile_report(_experiment(model__remat="none"), "h100:8") == 1
    finally:
        jax.config.update("jax_platforms", before)
    assert capsys.readouterr().out.count("topology     h100:8") == 2


def test_a_mesh_that_does_not_go_with_the_chips():
    with pytest.raises(InputError, match=r"mesh is .* product of 8, the number of devices"):
        estimate.estimate(_experiment(mesh__fsdp=3), EIGHT)
    with pytest.raises(InputError, match=r"data.batch_size is 128, but it must be a multiple of"):
        estimate.estimate(_experiment(), topology.parse("h100:256"))


def test_suggestions_are_settings_that_exist():
    found = []
    for changes in (
        {"model__remat": "none"},
        {"training__microbatches": 16},
        {"mesh__data": 2, "mesh__fsdp": 4},
    ):
        mesh = {"data": changes.get("mesh__data", 1), "fsdp": changes.get("mesh__fsdp", 8)}
        found += suggest(
            _experiment(**changes), mesh, state=1e9, available=16e9, parameters=374_000_000
        )
    settings = [word for line in found for word in line.split() if word.startswith("--config.")]
    assert {s.split("=")[0] for s in settings} >= {
        "--config.model.remat",
        "--config.training.microbatches",
        "--config.mesh.data",
        "--config.mesh.fsdp",
        "--config.mesh.tensor",
    }
    for setting in settings:
        check_override(*setting.removeprefix("--config.").split("="))


def test_a_state_that_is_too_large():
    experiment = _experiment("70b")
    few = suggest(experiment, {"fsdp": 8}, state=100e9, available=80e9, parameters=69 * 10**9)
    assert "more chips: state and gradients alone need 133.3 GB of 80.0 GB a device" in few[0]
    many = {"data": 64, "fsdp": 8}
    spread = suggest(experiment, many, state=100e9, available=80e9, parameters=69 * 10**9)
    assert spread[0].startswith("--config.mesh.data=1 --config.mesh.fsdp=512")


def test_the_roofline_between_full_overlap_and_none():
    found = roofline(
        CHIPS["v5p"],
        flops=459e12,
        hbm_bytes=2765e9 / 2,
        network=[
            Collective("all-gather", axes, 8, 1, 0, seconds)
            for axes, seconds in (("fsdp", 0.25), ("data", 0.375), ("data", 0.125))
        ],
        model_flops=0.6 * 459e12,
    )
    assert (found.compute, found.memory, found.bound) == (1.0, 0.5, "compute")
    assert found.overlapped == 1.0 and found.serial == 2.25
    assert math.isclose(found.mfu(found.overlapped), 0.6)
    half = roofline(CHIPS["tpu7x"], flops=2307e12, hbm_bytes=0, network=[], model_flops=0)
    assert half.compute == 2.0  # a device is half a chip


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("h200", 129),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in (("b200", 165), ("a100", 73))),
    ],
)
def test_other_gpus_by_the_same_formula(name, memory, small):
    """A step of 8: what is needed is the same, what there is and how fast is the chip's."""
    found = main.examine(_experiment(), topology.parse(f"{name}:8"))
    assert int(found.available / 1e9) == memory and found.needed == small.needed
    ratio = CHIPS["h100"].flops / CHIPS[name].flops
    compute = small.traffic.roofline.compute * ratio
    assert math.isclose(found.traffic.roofline.compute, compute)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
    ],
)
def test_a_running_step_is_measured_against_the_same_peak(kind, name):
    assert PEAK_FLOPS[kind] == CHIPS[name].flops


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
            " temporaries (56.50G) exceeds available HBM (15.75G). HLO module: jit_step.",
            (int(56.5 * 2**30), int(15.75 * 2**30), "temporaries alone"),
        ),
        (
            "Ran out of memory in memory space hbm. Used 512.00M of 95.50G hbm. Exceeded ...",
            (2**29, int(95.5 * 2**30), "in all"),
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_the_compilers_refusal(message, expected):
    assert compiler.read_refusal(message) == expected


def test_auto_takes_the_fastest_policy_that_fits(small, monkeypatch):
    needs = {"none": 2.0, "dots": 0.95, "attention": 0.94, "full": 0.5}

    def examine(experiment, where):
        needed = needs[experiment.model.remat] * where.chip.usable_bytes
        return dataclasses.replace(small, needed=needed, remat=experiment.model.remat)

    monkeypatch.setattr(main, "_examine", examine)
    found = main.examine(_experiment(model__remat="auto"), EIGHT)
    assert found.needed == 0.5 * EIGHT.chip.usable_bytes and found.fits
    assert found.remat.startswith("full, chosen by auto (its step needs 34.")
    assert "none needs more than there is" in found.remat and "dots needs 64." in found.remat
    assert main.examine(_experiment(model__remat="dots"), EIGHT).remat == "dots"
