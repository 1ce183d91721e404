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
