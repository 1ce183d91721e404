"""Runs the Hopper kernels in Pallas's interpret mode on named cases; NPROC=16 in the environment.

python -m tests.pallas_kernels.mosaic_gpu_interpreter NAME...
"""

import sys
from unittest import mock

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import problem, target
from pallas_kernels.mosaic_gpu import config
from tests import oracle
from tests.pallas_kernels import kernel_suite as suite

CASES = {
    case.name: case
    for case in (
        # Some tiles live, some dead, some negligible; near the table's end and past it.
        oracle.Case("sparse", (1, 250, 2, 1, 64), 100, "alibi", True, (-1.0, -0.4)),
        oracle.Case("packed", (1, 256, 2, 1, 64), 64, "alibi", True, documents=(100, 30)),
        oracle.Case("softmax", (1, 256, 2, 2, 64), 100, "bumpy", tau=None),
        oracle.Case("sharp", (1, 256, 1, 1, 64), 64, score_scale=4.0),
        oracle.Case("widest", (1, 200, 2, 1, 200), 64, "alibi", True, documents=(100, 30)),
        oracle.Case("gaps", (1, 200, 2, 1, 64), 40, "gaps", True, (-0.6, 0.4)),
        oracle.Case("positive", (1, 256, 2, 2, 64), 64, "steep", tau=(0.5, -1.0)),
        oracle.Case(
            "window",
            (1, 320, 2, 1, 64),
            64,
            "alibi",
            True,
            (-1.0, 0.4),
            settings=(("window", 200),),
        ),
        oracle.Case(
            "window_of_softmax", (1, 256, 2, 2, 64), 0, tau=None, settings=(("window", 100),)
        ),
        oracle.Case(
            "window_in_documents",
            (1, 256, 2, 2, 64),
            100,
            documents=(150, 30),
            settings=(("window", 65),),
            score_scale=4.0,
        ),
    )
}


def check_gradient_of_the_bias_apart() -> None:
    """Tables too wide for dK's kernel have a kernel of their own; here for a narrow one."""
    chosen = config.tunings(64, 0)
    assert chosen.backward_dbias is not None
    with mock.patch.object(config, "tunings", lambda *_: chosen):
        oracle.check_half_precision("mosaic_gpu", CASES["sparse"], "bfloat16", factor=1.2)


CHECKS = {
    "blind": lambda: oracle.check_blind_rows(
        "mosaic_gpu", dtype="bfloat16", tolerance=0.01, length=256, head_dim=64
    ),
    "blind_gradients": lambda: suite.check_gradients_of_blind_rows(
        "bfloat16", 0.02, "mosaic_gpu", head_dim=64
    ),
    "zero": lambda: oracle.check_gradient_of_an_offset_of_zero(
        "mosaic_gpu", dtype="bfloat16", tolerance=0.02, head_dim=64
    ),
    "bias_apart": check_gradient_of_the_bias_apart,
    "not_a_number": lambda: suite.check_not_a_number_comes_through(
        "bfloat16", "mosaic_gpu", tile=128
    ),
    "dead": lambda: suite.check_dead_tiles_do_not_matter(
        suite.SPARSE, "bfloat16", 2**-8, "mosaic_gpu"
    ),
    "same_bits": lambda: suite.check_same_bits_every_time(suite.SPARSE, "bfloat16", "mosaic_gpu"),
}


def main() -> None:
    """Checks the named cases, output and gradients."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    with target.compile_for("sm90"), problem.options(interpret=interpret):
        for name in sys.argv[1:]:
            if name in CHECKS:
                CHECKS[name]()
            else:
                case = CASES[name]
                factor = 3.0 if case.score_scale > 1 else 1.2
                oracle.check_half_precision("mosaic_gpu", case, "bfloat16", factor=factor)
            print(name, "passed", flush=True)


if __name__ == "__main__":
    main()
