import pytest

from lazyattn.compile.groups import first_group, transfer


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [0, 2]),
        ("replica_groups={}, x", list(range(8))),
        ("replica_groups=[2,4]<=[8], x", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [0, 4]),
        ("replica_groups=mesh['axis_0'=4] {'axis_0'}, x", [0, 1, 2, 3]),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'fsdp'}, x", [0, 2, 4, 6]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}, x", list(range(8))),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}, x", [0, 4]),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(4)2}, x", [0, 1]),
        ("channel_id=1, source_target_pairs={{0,1},{1,2}}, x", [0, 1]),
        ("channel_id=1, source_target_pairs={{0,0},{1,2},{2,1}}, x", [1, 2]),
        ("channel_id=1, source_target_pairs={{0,0},{1,1}}, x", [0]),  # nothing is sent
        ('_xla_send_recv_source_target_pairs="{{3,0}}"', [3, 0]),
        ("nothing of the kind", []),
    ],
)
def test_groups_in_every_notation(text, group):
    assert first_group(text, devices=8) == group


@pytest.mark.parametrize(
    ("kind", "target", "expected"),
    [
        ("ALL_REDUCE", '"{1,2}x{0:3}"', ("all-reduce", [100000, 200000])),
        ("ALL_GATHER", '"{2:4}x{1,3}"', ("all-gather", [200001, 300001, 400001])),
        (
            "REDUCE_SCATTER",
            "{{100000,300000},{200000,400000}}",
            ("reduce-scatter", [100000, 300000]),
        ),
        ("ALL_TO_ALL", "{{100000,100001,200000}}", ("all-to-all", [100000, 100001, 200000])),
        ("ONE_TO_ONE", "{{100003->200000}}", ("collective-permute", [100003, 200000])),
        ("SOMETHING", '"{1,2}x{0:3}"', None),
        ("ALL_REDUCE", '"everyone"', None),
    ],
)
def test_what_is_asked_of_megascale(kind, target, expected):
    rest = f'{{_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}'
    assert transfer("channel_id=2, frontend_attributes=" + rest) == expected
