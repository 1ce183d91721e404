"""A run on tokenised shards that lie elsewhere, vanish and come back."""

import json
import shutil

import pytest

from lazyattn.errors import InputError
from lazyattn.experiment import from_config_dict
from lazyattn.training import resume_data
from lazyattn.training.log import RunLog
from tests.data.shard_folders import write_folder
from tests.training import tiny

STEPS = 40  # past the first lane's first window


def _experiment(folder, **changes):
    config = tiny.get_config()
    config.data.path = str(folder)
    config.data.packing = "first_fit"
    config.training.steps = STEPS
    config.training.checkpoint_every = 50
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return from_config_dict(config)


def _losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


@pytest.mark.slow
def test_a_shard_that_vanishes_stops_the_run_and_loses_nothing(tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "shards", train=300, per_shard=2)
    away, write = tmp_path / "away", RunLog.write

    def take_away(log, record):
        if record["step"] == 2:
            away.mkdir()
            for shard in folder.glob("train-*"):
                shard.rename(away / shard.name)
        write(log, record)

    monkeypatch.setattr(RunLog, "write", take_away)
    workdir = tmp_path / "run"
    with pytest.raises(InputError) as caught:
        tiny.train(_experiment(folder), workdir)
    saved = max(_losses(workdir))
    assert "\n" not in str(caught.value)
    assert f"{folder}/train-" in str(caught.value) and "cannot be read" in str(caught.value)
    assert str(caught.value).endswith(f"Training stopped after step {saved}, which is saved.")
    assert (workdir / "checkpoints" / str(saved)).is_dir() and 2 < saved < STEPS

    printed = capsys.readouterr().out
    assert f"data     {folder}: 300 documents" in printed
    assert "rows filled by first_fit, 0.0% of" in printed

    # Back again, in another place and read by another process.
    monkeypatch.undo()
    for shard in away.iterdir():
        shard.rename(folder / shard.name)
    moved = folder.rename(tmp_path / "moved")
    before = _losses(workdir)
    assert tiny.train(_experiment(moved, data__num_workers=1), workdir) == 0
    after = _losses(workdir)
    assert sorted(after) == list(range(1, STEPS + 1))
    assert {step: after[step] for step in before} == before


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Two folders of shards, and the workdir of a run of one step on the first."""
    root = tmp_path_factory.mktemp("begun")
    first = write_folder(root / "first", train=120)
    other = write_folder(root / "other", train=121)
    assert tiny.train(_experiment(first, training__steps=1), root / "run", root / "cache") == 0
    return first, other, root


@pytest.mark.parametrize("data", ["other", "none", "nowhere", "sources", "changed"])
def test_a_resumption_with_other_data_names_data_path(begun, tmp_path, data):
    first, other, root = begun
    workdir = shutil.copytree(root / "run", tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    changes, message = {
        "other": (
            {"data__path": str(other)},
            rf"'{other}', which is other data than data.path = '",
        ),
        "none": ({"data__path": None}, rf"None, but the checkpoints .* were made with '{first}'"),
        "nowhere": ({"data__path": f"{tmp_path}/x"}, rf"'{tmp_path}/x', but that is no folder of"),
        "sources": (
            {"data__path": None, "data__sources": ((str(other), 1.0),)},
            rf".*, which is other data than data.path = '{first}'",
        ),
        "changed": ({}, rf"'{first}', but it does not hold what it held"),
    }[data]
    moved = None
    if data == "changed":
        moved = first.rename(tmp_path / "moved")
        shutil.copytree(other, first)
    try:
        experiment = _experiment(first, training__steps=3, **changes)
        name = "data.sources" if data == "sources" else "data.path"
        with pytest.raises(InputError, match=rf"^(config\.)?{name} is {message}") as caught:
            tiny.train(experiment, workdir, root / "cache")
        assert "\n" not in str(caught.value)
    finally:
        if moved is not None:
            shutil.rmtree(first)
            moved.rename(first)
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    assert {path: after.get(path) for path in before if path.name != ".lock"} == {
        path: time for path, time in before.items() if path.name != ".lock"
    }


def test_shards_where_text_was_name_data_path():
    text = from_config_dict(tiny.get_config("text"))
    on_shards = _experiment("shards")
    with pytest.raises(InputError, match=r"^config.data.path is 'shards', but .* with None; set"):
        resume_data.require_same_kind(text.to_dict(), on_shards)
    resume_data.require_same_kind(on_shards.to_dict(), _experiment("moved"))
    resume_data.require_same_kind(text.to_dict(), text)
