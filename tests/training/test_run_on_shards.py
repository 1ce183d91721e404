"""A run on tokenised shards that lie elsewhere, vanish and come back."""

import json

import pytest

from lazyattn.errors import InputError
from lazyattn.experiment import from_config_dict
from lazyattn.training import run
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
        run.train(_experiment(folder), workdir)
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
    assert run.train(_experiment(moved, data__num_workers=1), workdir) == 0
    after = _losses(workdir)
    assert sorted(after) == list(range(1, STEPS + 1))
    assert {step: after[step] for step in before} == before
