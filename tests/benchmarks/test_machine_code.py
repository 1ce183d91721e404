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
    "head_dim, offset, packed", itertools.product((64, 96, 128, 256), (True, False), (True, False))
)
def test_hopper_kernels_keep_their_operands(head_dim, offset, packed, tmp_path, capsys):
    flags = [f"--head_dim={head_dim}", f"--offset={offset}", f"--packed={packed}"]
    command = [sys.executable, "-m", "benchmarks.mosaic_gpu_static", *flags, "--sass"]
    path = tmp_path / "code"
    with path.open("w") as file:
        subprocess.run(
            [*command, f"--cuda_root={_cuda_root()}"],
            stdout=file, stderr=subprocess.STDOUT, check=True, timeout=600,
        )  # fmt: skip
    assert machine_code.main([str(path)]) == 0, capsys.readouterr().out
    assert "lazy_backward_key" in capsys.readouterr().out
