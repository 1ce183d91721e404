import pytest

from benchmarks import compile_table


def test_slices():
    assert str(compile_table.slice_of("v5p", 512)) == "v5p:8x8x8"
    assert str(compile_table.slice_of("v5e", 512)) == "2*v5e:16x16"
    for chip, slices in compile_table.SLICES.items():
        for chips in slices:
            assert compile_table.slice_of(chip, chips).chips == chips


@pytest.mark.slow
def test_a_row():
    where = compile_table.slice_of("h100", 16)
    row = compile_table.try_out("lazy_340m_10b", where)
    assert row["fits"] and row["mesh"] == {"data": 2, "fsdp": 8} and row["tried"] == 1
    row |= {"config": "lazy_340m_10b", "topology": str(where), "chips": 16}
    told = compile_table.table([row])
    assert len({line.count("|") for line in told}) == 1
    assert told[2].startswith("| 340m | h100:16 | data 2 fsdp 8, 1 | 0.6 + ")
    assert told[2].endswith("| by formula |")
