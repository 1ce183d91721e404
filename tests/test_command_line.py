"""Flags and config overrides as typed; in this process, since parsing is all it takes."""

import pytest
from absl import flags
from ml_collections import config_flags

from lazyattn.command_line import parse, shipped_configs
from lazyattn.errors import InputError

QUICKSTART = "--config=configs/quickstart.py"


def _parse(*arguments):
    argv = ["train.py", *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_integer("seed", 0, "", flag_values=values)
    parse(argv, values)
    return values


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def test_overrides_reach_the_config():
    config = _parse(
        f"{QUICKSTART}:softmax",
        "--workdir=w",
        "--config.optimizer.learning_rate=1e-2",
        *("--config.training.steps", "7"),
        "--noconfig.model.attention.rope",
        "--config.model.attention.num_kv_heads=2",
    ).config
    assert config.model.attention.variant == "softmax"
    assert config.optimizer.learning_rate == 1e-2
    assert config.training.steps == 7
    assert config.model.attention.rope is False
    assert config.model.attention.num_kv_heads == 2


@pytest.mark.parametrize("folder", [".", "tests"])
@pytest.mark.parametrize(
    "name", ["quickstart:softmax", "configs/quickstart:softmax", "configs/quickstart.py:softmax"]
)
def test_a_config_by_its_name(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    config = _parse(f"--config={name}").config
    assert (config.model.attention.variant, config.model.width) == ("softmax", 192)


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text(
        "from lazyattn.experiment import defaults\n"
        "def get_config():\n  c = defaults()\n  c.model.width = 96\n  return c\n"
    )
    assert _parse("--config=quickstart").config.model.width == 96


def test_names_of_configs():
    names = set(shipped_configs())
    assert {"ablations", "base", "fineweb_edu", "quickstart"} <= names
    assert not any("__init__" in name for name in names)


@pytest.mark.parametrize(
    ("name", "variant", "width"),
    [
        ("fineweb_edu:lazy_340m_10b", "lazy", 1024),
        ("configs/lazy_340m_10b.py", "lazy", 1024),
        ("lazy_760m_100b:softmax", "softmax", 1536),
        ("configs/ablations/no_bias.py:sharp", "lazy_no_bias", 1024),
        ("ablations:renormalized", "lazy_renormalized", 1024),
    ],
)
def test_names_of_runs_that_were_files(name, variant, width):
    config = _parse(f"--config={name}").config
    assert (config.model.attention.variant, config.model.width) == (variant, width)


def test_no_config_at_all():
    assert _parse("--workdir=w").config is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([QUICKSTART, "--config.optimizer.lr=1"], "config.optimizer.lr is unknown; config.optimi"),
        ([QUICKSTART, "--config.training.steps=many"], "config.training.steps is 'many', but"),
        ([QUICKSTART, "--config.training.steps", "many"], "config.training.steps is 'many', but"),
        ([QUICKSTART, "--config.training.steps"], "config.training.steps is '', but it must be"),
        ([QUICKSTART, "--config.model=3"], "config.model is a group of settings"),
        ([f"{QUICKSTART}:softmx"], "The attention 'softmx' after the config file's colon is"),
        (["--config=configs/nope.py"], "--config is 'configs/nope.py', but it must be a config fi"),
        (["--config=gs://a/b.py"], "--config is 'gs://a/b.py', but it must be a path on this mach"),
        (["--config=hub:/no/where"], "The folder behind the colon of --config is '/no/where',"),
        (["--config.training.steps=3"], "config.training.steps is set, but no --config=FILE"),
        ([QUICKSTART, "--worker=w"], "Unknown command line flag 'worker'"),
        ([QUICKSTART, "--seed=x"], "flag --seed=x: "),
        ([QUICKSTART, "extra"], "The argument 'extra' is not a flag"),
    ],
)
def test_mistakes_come_out_as_one_sentence(arguments, message):
    with pytest.raises(InputError) as caught:
        _parse(*arguments)
    text = str(caught.value)
    assert text.startswith(message)
    assert text.endswith(".") and "\n" not in text and "Traceback" not in text


def test_a_config_file_with_a_mistake_in_it(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config():\n  return 1 + 'a'\n")
    with pytest.raises(
        InputError, match=r"^The config file can't be used: TypeError: unsupp"
    ) as caught:
        _parse(f"--config={path}")
    assert "\n" not in str(caught.value)


def test_a_config_file_that_misspells_a_key(tmp_path):
    path = tmp_path / "misspelt.py"
    path.write_text(
        "from lazyattn.experiment import defaults\n"
        "def get_config():\n  c = defaults()\n  c.trainig.steps = 3\n  return c\n"
    )
    with pytest.raises(InputError, match="trainig") as caught:
        _parse(f"--config={path}")
    assert "\n" not in str(caught.value)
