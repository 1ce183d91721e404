"""The train step talks between devices as it was meant to, and no more."""

import collections
import math

import pytest

from tests.sharding import cases, hlo
from tests.sharding.processes import report_of

QUICK = ("fsdp_tensor_sequence",)
SLOW = ("data", "fsdp", "tensor", "sequence", "data_fsdp_tensor", "fsdp_sequence")
MATRICES = 6  # of a block: query, key, value, output, gate and up as one, down
ROWS_LOGITS_NEED = 2  # embedding and unembedding


def _report(*names):
    found = report_of("tests.sharding.collectives_program", *names)
    return {
        name: [
            hlo.Collective(kind, tuple(map(tuple, shapes)), tuple(dtypes))
            for kind, shapes, dtypes in rows
        ]
        for name, rows in found["collectives"].items()
    } | {"kept": found["kept"]}


@pytest.fixture(scope="module")
def report():
    return _report(*QUICK)


def expected_counts(mesh):
    """Returns how often each kind is meant to occur; the blocks are a loop, counted once."""
    fsdp, sequence = mesh.fsdp > 1, mesh.sequence > 1
    return {
        # Parameters forward and again backward, looked-up tables once; keys with values
        # forward and again backward, documents once.
        "all-gather": fsdp * (2 * MATRICES + ROWS_LOGITS_NEED) + sequence * (2 + 1),
        # Gradients of tables; of keys with values. (Those of matrices are all-reduces on
        # CPUs, which other compilers turn into reduce-scatters.)
        "reduce-scatter": fsdp * ROWS_LOGITS_NEED + sequence,
        "all-to-all": 0,
        # Dealing: two for each of ids, positions and documents; for hidden states also
        # backward.
        "collective-permute": sequence * (2 * 3 + 2 * 2),
    }


def gathered_activations(found, mesh):
    """Returns the all-gathers of float arrays that are as large as hidden states."""
    config = cases.model()
    rows = cases.ROWS // (mesh.data * mesh.fsdp)
    hidden = rows * cases.LENGTH * config.width // mesh.sequence
    return [
        collective
        for collective in found
        if collective.kind == "all-gather"
        for shape, dtype in zip(collective.shapes, collective.dtypes, strict=True)
        if dtype.startswith(("f", "bf"))
        and math.prod(shape) >= hidden
        and shape not in _known(config, mesh, rows)
    ]


def _known(config, mesh, rows):
    """Returns shapes that are gathered on purpose: parameters, keys and values."""
    t, d, w, m = mesh.tensor, config.head_dim, config.width, config.hidden_width
    heads, kv = config.attention.num_heads // t, config.attention.kv_heads // t
    part = cases.LENGTH // mesh.sequence
    parameters = {(w, heads, d), (w, kv, d), (heads, d, w), (w, 2, m // t), (m // t, w)}
    return parameters | {(config.vocab_size // t, w), (mesh.sequence, rows, part, kv, 2 * d)}


def check(found, mesh):
    counts = collections.Counter(collective.kind for collective in found)
    expected = expected_counts(mesh)
    assert {kind: counts[kind] for kind in expected} == expected
    assert not gathered_activations(found, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_collectives_are_those_meant(report, name):
    check(report[name], cases.MESHES[name])


@pytest.mark.slow
def test_collectives_of_every_mesh_are_those_meant():
    for name, found in _report(*SLOW).items():
        if name in cases.MESHES:
            check(found, cases.MESHES[name])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gathered", "fetched"])
def test_whole_keys_and_values_are_not_kept_between_passes(report, how):
    # Query, key, value, output and the sum of live values, of a device's own part; whole rows
    # of keys would be eight parts.
    assert 5 <= report["kept"][how] < 6.5


@pytest.mark.slow
def test_gathered_activations_would_be_found(report):
    assert len(gathered_activations(report["careless"], cases.MESHES["data"])) == 1


def test_instructions_are_read_as_xla_writes_them():
    text = """
  %a = f32[8,4]{1,0} all-gather(%x), replica_groups={{0,1},{2,3}}, dimensions={0}
  %b = (f32[2]{0}, /*index=1*/s32[]) all-reduce(%y, %z), replica_groups=[2,4]<=[8], to_apply=%r
  %c = f32[8]{0} all-reduce(%x), replica_groups=mesh['data'=8,'tensor'=1] {'tensor'}
  %d = f32[8]{0} all-gather-start(%x), replica_groups=mesh['data'=8,'tensor'=1] {'data'}
  %e = f32[8]{0} add(%all-gather.1, %x)
"""
    assert hlo.collectives(text) == [
        hlo.Collective("all-gather", ((8, 4),), ("f32",)),
        hlo.Collective("all-reduce", ((2,), ()), ("f32", "s32")),
        hlo.Collective("all-gather", ((8,),), ("f32",)),
    ]
