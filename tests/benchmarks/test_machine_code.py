import importlib.util
import itertools
import pathlib
import subprocess
import sys

import pytest

from benchmarks import machine_code

_LOOP = """
.text.kernel:
        /*0000*/                   LDSM.16.M88.4 R24, [R2] ;
        /*0010*/                   MOV R28, 0x1 ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R56, R24, gdesc[UR8], RZ, !UPT ;
        /*0030*/                   F2FP.BF16.F32.PACK_AB R{first}, R57, R56 ;
        /*0040*/                   F2FP.BF16.F32.PACK_AB R{second}, R59, R58 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R88, R32, gdesc[UR8], R88 ;
        /*0060*/              @P1  BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""


@pytest.mark.parametrize(
    "first, second, overwritten", [(32, 33, 0), (24, 33, 1), (26, 27, 2), (28, 29, 0)]
)
def test_operands_that_a_loop_overwrites(first, second, overwritten):
    (code,) = machine_code.kernels(_LOOP.format(first=first, second=second)).values()
    assert len(code) == 9
    assert len(machine_code.overwritten_operands(code)) == overwritten


def test_a_product_may_overwrite_what_it_is_added_to():
    (code,) = machine_code.kernels(_LOOP.format(first=32, second=33)).values()
    code[3] = code[3].replace("R56, R24", "R24, R24")
    assert len(machine_code.overwritten_operands(code)) == 4


_RELEASE = """
.text.kernel:
        /*0000*/                   LDS.64 R24, [R2] ;
        /*0010*/                   {first} ;
.L_x_1:
        /*0020*/                   {second} ;
        /*0030*/              @P1  BRA `(.L_x_1) ;
        /*0040*/                   BAR.ARV R3, 0x1a0 ;
        /*0050*/                   EXIT ;
"""
_PRODUCT = "HGMMA.64x64x16.F32.BF16 R56, gdesc[UR8], RZ, !UPT, gsb0"


@pytest.mark.parametrize(
    "first, second, loads",
    [
        ("NOP", "NOP", 1),
        ("BAR.SYNC.DEFER_BLOCKING R7, 0x80", "NOP", 1),
        ("FADD R4, R5, R25", "NOP", 0),
        ("@P1 FADD R4, R5, R25", "NOP", 1),
        ("FENCE.VIEW.ASYNC.S", "NOP", 0),
        (_PRODUCT, "NOP", 1),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", _PRODUCT, 1),
        (_PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x0", 0),
        (_PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", 1),
        ("NOP", "LDS R9, [R2+0x4]", 2),
    ],
)
def test_slots_given_back_while_loads_are_in_flight(first, second, loads):
    (code,) = machine_code.kernels(_RELEASE.format(first=first, second=second)).values()
    assert len(machine_code.released_while_loading(code)) == loads


def test_files_without_machine_code_are_refused(tmp_path, capsys):
    path = tmp_path / "empty"
    path.write_text("ptxas info\n")
    assert machine_code.main([str(path)]) == 1
    assert "--sass" in capsys.readouterr().out


def _cuda_root() -> str:
    """Returns a folder whose bin has nvdisasm: Triton's."""
    for package in ("jax_cuda13_plugin", "triton"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; requirements/cuda.txt has it")
    (folder,) = importlib.util.find_spec("triton").submodule_search_locations
    root = pathlib.Path(folder, "backends", "nvidia")
    if not (root / "bin" / "nvdisasm").exists():
        pytest.skip("Triton has no nvdisasm here")
    return str(root)


@pytest.mark.slow
@pytest.mark.parametrize(
    "head_dim, offset, packed, width",
    [
        *itertools.product((64, 96, 128, 256), (True, False), (True, False), (1024,)),
        # The gradient of a wide table has a kernel of its own.
        (64, True, False, 4096),
        (64, False, False, 4096),
    ],
)
def test_hopper_kernels_keep_their_operands(head_dim, offset, packed, width, tmp_path, capsys):
    flags = [f"--head_dim={head_dim}", f"--offset={offset}", f"--packed={packed}"]
    flags += [f"--width={width}"]
    command = [sys.executable, "-m", "benchmarks.mosaic_gpu_static", *flags, "--sass"]
    path = tmp_path / "code"
    with path.open("w") as file:
        subprocess.run(
            [*command, f"--cuda_root={_cuda_root()}"],
            stdout=file, stderr=subprocess.STDOUT, check=True, timeout=600,
        )  # fmt: skip
    assert machine_code.main([str(path)]) == 0, capsys.readouterr().out
    assert "lazy_backward_dkv" in capsys.readouterr().out
