"""Checkpoints whose settings are of another version."""

import json
import shutil
from pathlib import Path

import pytest

from lazyattn.checkpoint import schema
from lazyattn.checkpoint.load import load_trained
from lazyattn.errors import InputError
from lazyattn.experiment import ExperimentConfig, from_config_dict
from lazyattn.model.config import RECIPES, AttentionConfig
from tests.training import tiny

WHERE = Path("runs/old/checkpoints/7")


def test_todays_settings_come_back():
    settings = ExperimentConfig().to_dict()
    assert schema.stamped(settings)["schema"] == schema.SCHEMA
    assert schema.upgraded(schema.stamped(settings), WHERE) == settings
    assert len(schema.UPGRADES) == schema.SCHEMA


def test_a_setting_added_since_gets_its_default():
    settings = ExperimentConfig().to_dict()
    del settings["training"]["max_failed_saves"], settings["data"]["sources"]
    assert from_config_dict(schema.upgraded(settings, WHERE)) == ExperimentConfig()


def test_a_bias_without_a_kind_was_a_table():
    settings = schema.stamped(ExperimentConfig().to_dict()) | {"schema": 1}
    attention = settings["model"]["attention"]
    del attention["bias_kind"]
    found = from_config_dict(schema.upgraded(settings, WHERE))
    assert found.model.attention == AttentionConfig(**RECIPES["sharp_table"])
    attention["bias_tail"] = False
    assert not from_config_dict(schema.upgraded(settings, WHERE)).model.attention.has_tail


def test_a_key_that_was_renamed_is_read_by_an_upgrade(monkeypatch):
    def rename(settings):
        settings["training"]["keep"] = settings["training"].pop("checkpoints_kept")
        return settings

    settings = ExperimentConfig().to_dict()
    settings["training"]["checkpoints_kept"] = settings["training"].pop("keep") + 4
    old = schema.stamped(settings)
    monkeypatch.setattr(schema, "SCHEMA", schema.SCHEMA + 1)
    monkeypatch.setattr(schema, "UPGRADES", (*schema.UPGRADES, rename))
    assert from_config_dict(schema.upgraded(old, WHERE)).training.keep == 7
    assert "checkpoints_kept" in old["training"]  # what was read stays as it is


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, r"checkpoints/7 has settings of schema 99, .* reads schemas 0 to \d"),
        ({"schema": "x"}, r"settings of schema 'x'"),
        (
            {"model": {"attention": {"gate": True}}},
            r"checkpoints/7 has settings .* can't read: config.model.attention.gate is unknown",
        ),
        ({"training": {"keep": "all"}}, r"config.training.keep is 'all'"),
    ],
)
def test_what_can_not_be_read_is_named(change, message):
    with pytest.raises(InputError, match=message) as caught:
        schema.upgraded(schema.stamped(ExperimentConfig().to_dict()) | change, WHERE)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_runs_of_older_and_newer_versions(tmp_path):
    """The settings in a real checkpoint are changed to those of other versions."""
    text, cache = tiny.write_text(tmp_path / "text"), tmp_path / "cache"

    def experiment(steps, recipe="sharp_table"):
        config = tiny.get_config(text)
        config.training.steps = steps
        config.model.attention.update(RECIPES[recipe])
        return from_config_dict(config)

    assert tiny.train(experiment(1), tmp_path / "first", cache) == 0

    def rewritten(name, change):
        folder = shutil.copytree(tmp_path / "first", tmp_path / name)
        path = folder / "checkpoints" / "1" / "experiment" / "metadata"
        settings = json.loads(path.read_text())
        assert settings["schema"] == schema.SCHEMA
        change(settings)
        path.write_text(json.dumps(settings))
        return folder

    def before_the_stamp(settings):
        before_a_bias_had_a_kind(settings)
        del settings["schema"], settings["training"]["inspect_every"]

    def before_a_bias_had_a_kind(settings):
        settings["schema"] = 1
        new = ("bias_kind", "global_share", "global_rope", "slope_shards", "window", "output_gate")
        for name in new:
            del settings["model"]["attention"][name]
        del settings["optimizer"]["log_slope_factor"]

    assert tiny.train(experiment(2), rewritten("old", before_the_stamp), cache) == 0
    # `sharp` was a table then. Such a run goes on as what it is now called, not as a decay.
    table = rewritten("table", before_a_bias_had_a_kind)
    assert tiny.train(experiment(2), table, cache) == 0
    assert load_trained(table).experiment.model == experiment(2).model
    with pytest.raises(InputError, match=r"attention.bias_kind is 'decay', .* made with 'table'"):
        tiny.train(experiment(3, "sharp"), table, cache)

    removed = rewritten("removed", lambda settings: settings["model"].update(depth=3))
    newer = rewritten("newer", lambda settings: settings.update(schema=99))
    for folder, message in ((removed, "config.model.depth is unknown"), (newer, "schema 99")):
        with pytest.raises(InputError, match=message):
            tiny.train(experiment(2), folder, cache)
        # It is not damaged, so nothing is moved away.
        assert (folder / "checkpoints" / "1").is_dir() and not (folder / "damaged").exists()
