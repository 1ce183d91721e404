"""What is refused before data is prepared or anything compiled, and what a run keeps."""

import dataclasses
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.checkpoint.load import load_trained
from lazyattn.checkpoint.manager import Checkpoints
from lazyattn.checkpoint.state import make_state_factory
from lazyattn.data.pipeline import prepare
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from lazyattn.eval.main import evaluate
from lazyattn.experiment import from_config_dict
from lazyattn.export.flags import ExportOptions
from lazyattn.export.main import export
from lazyattn.generation.sampling import SamplingConfig
from lazyattn.sample.main import sample
from lazyattn.sharding import MeshConfig
from lazyattn.training import beginning
from lazyattn.training import main as run
from lazyattn.training.optimizer import make_optimizer
from tests.training import tiny


@pytest.fixture(scope="module")
def trained(text, cache, tmp_path_factory):
    """A folder of a run of 2 steps."""
    folder = tmp_path_factory.mktemp("trained")
    assert tiny.train(tiny.experiment(text, training__steps=2), folder, cache) == 0
    return folder


@pytest.fixture
def nothing_long(monkeypatch):
    """Fails the test if data is prepared or a state is made."""

    def too_late(*_, **__):
        pytest.fail("the mistake was not found before the work began")

    monkeypatch.setattr(beginning, "prepare", too_late)
    monkeypatch.setattr(run.remat, "make_step", too_late)


@pytest.mark.usefixtures("nothing_long")
def test_a_mesh_that_does_not_fit(text, tmp_path):
    experiment = dataclasses.replace(tiny.experiment(text), mesh=MeshConfig(data=1, tensor=3))
    with pytest.raises(InputError, match=r"mesh is .* number of devices"):
        tiny.train(experiment, tmp_path)


@pytest.mark.usefixtures("nothing_long")
def test_devices_without_products_in_float8(text, tmp_path, monkeypatch):
    def refuse(quantization, mesh):
        assert mesh.size >= 1
        raise InputError(f"no {quantization} here")

    monkeypatch.setattr(run.fp8, "check_devices", refuse)
    with pytest.raises(InputError, match="no fp8 here"):
        tiny.train(tiny.experiment(text, training__quantization="fp8"), tmp_path)


@pytest.mark.usefixtures("nothing_long")
def test_an_unwritable_workdir(text, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--workdir is '.*/file/run', .* can be written to \(Not"):
        tiny.train(tiny.experiment(text), tmp_path / "file" / "run")


@pytest.mark.usefixtures("nothing_long")
def test_resuming_with_a_different_model(text, trained):
    with pytest.raises(InputError, match=r"config.model.width is 32, but the checkpoints .* 16"):
        tiny.train(tiny.experiment(text, model__width=32), trained)


@pytest.mark.usefixtures("nothing_long")
def test_resuming_with_other_data(text, trained):
    with pytest.raises(InputError, match=r"config.data.batch_size is 8, but the checkpoints"):
        tiny.train(tiny.experiment(text, data__batch_size=8), trained)


@pytest.mark.usefixtures("nothing_long")
def test_no_checkpoint_of_this_run_can_be_read(text, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    for path in (folder / "checkpoints").glob("*/experiment/metadata"):
        path.write_text("{")
    with pytest.raises(InputError, match=r"none of the checkpoints in .* can be read"):
        tiny.train(tiny.experiment(text), folder)


def test_missing_data(tmp_path, cache):
    with pytest.raises(InputError, match=r"data\.source"):
        tiny.train(tiny.experiment(tmp_path / "nowhere"), tmp_path / "run", cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"data\.source"):
        tiny.train(tiny.experiment(tmp_path / "empty"), tmp_path / "run", cache)


def test_a_tokenizer_bigger_than_the_vocabulary(text, tmp_path, cache):
    big = Tokenizer.train([tiny.TEXT * 5, "some other words, too"], 320)
    big.save(tmp_path / "big.json")
    assert big.vocab_size > 280
    experiment = tiny.experiment(text, data__tokenizer=str(tmp_path / "big.json"))
    message = rf"model.vocab_size is 280, but it must be at least {big.vocab_size}"
    with pytest.raises(InputError, match=message):
        tiny.train(experiment, tmp_path / "run", cache)


def test_another_tokenizer_than_the_one_in_the_workdir(text, trained, cache, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    Tokenizer.train(["quite another text"], 262).save(folder / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer.json is not the tokenizer of this data"):
        tiny.train(tiny.experiment(text, training__steps=3), folder, cache)
    with pytest.raises(InputError, match="another tokenizer than the run was trained with"):
        evaluate(folder, cache_dir=cache)


@pytest.mark.parametrize("make", [lambda folder: folder, lambda folder: folder / "nowhere"])
def test_no_checkpoint_to_evaluate_or_sample_from(tmp_path, make):
    folder = make(tmp_path)
    for use in (lambda: evaluate(folder), lambda: sample(folder, "", SamplingConfig())):
        with pytest.raises(InputError, match=r"--workdir is .* a run with a checkpoint"):
            use()


@pytest.mark.slow
def test_a_model_of_fixed_context_is_sampled_with_a_cache_of_that_length(
    text, cache, tmp_path, capsys
):
    experiment = tiny.experiment(
        text, training__steps=1, model__attention__variant="lazy_length_offset"
    )
    length = experiment.data.sequence_length
    assert tiny.train(experiment, tmp_path, cache) == 0
    assert "sample" in capsys.readouterr().out
    sample(tmp_path, "", SamplingConfig(max_new_tokens=length - 1))
    with pytest.raises(InputError, match=f"the cache has room for {length} tokens"):
        sample(tmp_path, "", SamplingConfig(max_new_tokens=length))


@pytest.mark.slow
def test_several_samples_are_told_apart(trained, capsys):
    sampling = SamplingConfig(max_new_tokens=3)
    sample(trained, ["may look", "may look"], sampling)
    lines = capsys.readouterr().out.splitlines()
    places = [lines.index(f"=== sample {number} of 2 ===") for number in (1, 2)]
    assert places[0] == 0
    assert all(lines[place + 1].startswith("may look") for place in places)
    sample(trained, ["may look"], sampling)
    assert capsys.readouterr().out.startswith("may look")  # one alone is text and nothing else


def test_evaluating_another_model(text, trained, cache):
    with pytest.raises(InputError, match=r"config.model.num_layers is 3, but the checkpoints"):
        evaluate(trained, tiny.experiment(text, model__num_layers=3), cache)


def test_what_a_workdir_holds(trained, text):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        *("checkpoints", "config.json", "metrics.jsonl", "tensorboard", "tokenizer.json", ".lock")
    }
    saved = json.loads((trained / "config.json").read_text())
    assert from_config_dict(saved) == tiny.experiment(text, training__steps=2)


def test_a_trained_model_comes_back(trained, text):
    found = load_trained(trained)
    assert found.step == 2
    assert found.experiment == tiny.experiment(text, training__steps=2)
    assert found.checkpoint == trained / "checkpoints" / "2"
    assert found.tokenizer.decode(found.tokenizer.encode("may look")) == "may look"
    settings = found.experiment
    optimizer = make_optimizer(settings.optimizer, settings.training.steps)
    abstract = make_state_factory(settings, found.mesh, optimizer).abstract
    with Checkpoints(trained, read_only=True) as checkpoints:
        state = checkpoints.restore(abstract).state
    np.testing.assert_array_equal(found.params["embedding"], state.params["embedding"])
    assert jnp.any(state.params["embedding"] != 0)


@pytest.mark.slow
def test_a_step_is_chosen_in_every_mode(text, cache, tmp_path, capsys):
    experiment = tiny.experiment(text, training__steps=3, training__checkpoint_every=1)
    assert tiny.train(experiment, tmp_path, cache) == 0
    best = tmp_path / "checkpoints" / "3"
    assert f"best checkpoint            {best} (validation loss" in capsys.readouterr().out
    models = {step: load_trained(tmp_path, step=step) for step in (None, 1, "best")}
    assert [model.step for model in models.values()] == [3, 1, 3]
    first = np.asarray(models[1].params["embedding"])
    assert np.any(first != np.asarray(models[None].params["embedding"]))
    with pytest.raises(InputError, match=r"--step is 9, but the checkpoints .* steps 1, 2, 3\."):
        sample(tmp_path, "may", SamplingConfig(), step=9)
    assert evaluate(tmp_path, cache_dir=cache, step=1) == 0
    assert f"checkpoint       {tmp_path / 'checkpoints' / '1'}\n" in capsys.readouterr().out
    folder = export(tmp_path, options=ExportOptions(output=str(tmp_path / "out")), step=2)
    assert json.loads((folder / "config.json").read_text())["lazyattn"]["step"] == 2
    with pytest.raises(InputError, match="--step is 2, but --import_from has no checkpoints"):
        export(None, options=ExportOptions(import_from=str(folder), output="new"), step=2)


def _contents(folder):
    """Returns what is in a folder, and when it was written; but for who had the lock."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_finished_run_trains_no_more_and_sums_up_again(trained, text, cache, capsys):
    before = _contents(trained)
    changed = tiny.experiment(text, training__steps=2, optimizer__learning_rate=1.0)
    assert tiny.train(changed, trained, cache) == 0
    assert _contents(trained) == before
    out = capsys.readouterr().out
    assert "already at step 2, the last (training.steps): nothing is left to train\n" in out
    assert "resuming" not in out and "validation loss" in out and "go on with" in out


@pytest.mark.usefixtures("nothing_long")
def test_fewer_steps_than_were_done_change_nothing(trained, text, cache, capsys):
    before = _contents(trained)
    assert tiny.train(tiny.experiment(text, training__steps=1), trained, cache) == 0
    assert _contents(trained) == before
    said = "already at step 2, past training.steps = 1: nothing was done\n"
    assert capsys.readouterr().out == said
    other = tiny.experiment(text, training__steps=1, model__width=8)
    with pytest.raises(InputError, match=r"model\.width is 8"):
        tiny.train(other, trained, cache)
    assert _contents(trained) == before


@pytest.mark.parametrize("folder", ["new", "new/below/another", "mine"])
def test_a_run_refused_for_its_data_leaves_nothing(text, cache, tmp_path, folder):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("of the user")
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("too little. " * 9)
    Tokenizer.train([tiny.TEXT * 5, "some other words, too"], 320).save(tmp_path / "big.json")
    before = sorted(path for path in tmp_path.rglob("*"))
    for changes in (
        {"data__source": str(tmp_path / "nowhere")},
        {"data__source": str(tmp_path / "short")},
        {"data__path": str(tmp_path / "nowhere")},
        {"data__tokenizer": str(tmp_path / "big.json")},
    ):
        with pytest.raises(InputError):
            tiny.train(tiny.experiment(text, **changes), tmp_path / folder, cache)
        assert sorted(path for path in tmp_path.rglob("*")) == before, changes


def test_data_that_can_not_be_read_at_the_first_step_leaves_nothing(
    text, cache, tmp_path, monkeypatch
):
    def unreadable(*_, **__):
        raise InputError("it can't be read.")

    monkeypatch.setattr(run, "fit", unreadable)  # its files are open by then
    with pytest.raises(InputError, match="it can't be read"):
        tiny.train(tiny.experiment(text), tmp_path / "run", cache)
    assert list(tmp_path.iterdir()) == []


def test_other_texts_are_named(trained, text, cache, tmp_path, monkeypatch):
    other = shutil.copytree(text, tmp_path / "text")
    folder = shutil.copytree(trained, tmp_path / "run")
    experiment = tiny.experiment(other, training__steps=3)
    saved = next((folder / "checkpoints" / "2" / "experiment").glob("metadata"))
    saved.write_text(saved.read_text().replace(str(text), str(other)))
    (other / "000.txt").write_text("attention may look at nothing. " * 9)
    before = _contents(folder)
    monkeypatch.setattr(Checkpoints, "restore", lambda *_: pytest.fail("too late"))
    message = rf"^config.data.source is '{other}', but it does not hold what it held when the che"
    with pytest.raises(InputError, match=message):
        tiny.train(experiment, folder, cache)
    assert _contents(folder) == before


@pytest.mark.slow
def test_validation_figures_say_what_they_cover(text, cache, tmp_path, capsys):
    """Training may validate on a part of the split; `--mode=eval` never does."""
    partly = tiny.experiment(text, training__steps=1, training__eval_batches=2)
    assert tiny.train(partly, tmp_path, cache) == 0
    batch = partly.data.batch_size * partly.data.sequence_length
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    tokens = record["validation_tokens"]
    assert batch < tokens <= 2 * batch
    out = capsys.readouterr().out
    part = f"over {tokens:,} tokens, the first 2 batches of the validation split"
    assert f"validation loss            {record['validation_loss']:.4f} nats a token {part}" in out
    assert f"tokens {tokens:,}\n" in out
    evaluate(tmp_path, cache_dir=cache)
    (whole,) = re.findall(
        r"nats a token over ([\d,]+) tokens, the whole validation split", capsys.readouterr().out
    )
    split = prepare(partly.data, cache).counts["validation"].targets
    assert int(whole.replace(",", "")) == split > 2 * tokens
    # As many batches as there are, or more, are the whole split.
    wide = tmp_path / "wide"
    experiment = tiny.experiment(text, training__steps=1, training__eval_batches=99)
    assert tiny.train(experiment, wide, cache) == 0
    assert f"over {split:,} tokens, the whole validation split" in capsys.readouterr().out


def test_every_parameter_of_the_model_is_in_a_decay_group(text):
    from lazyattn.model.parameters import parameter_shapes
    from lazyattn.training.optimizer import decay_mask

    for variant in ("lazy", "softmax"):
        experiment = tiny.experiment(text, model__attention__variant=variant)
        model = dataclasses.replace(
            experiment.model,
            tie_embeddings=False,
            attention=dataclasses.replace(experiment.model.attention, qk_norm=True),
        )
        # Raises for a parameter in no group.
        mask = decay_mask(parameter_shapes(model))
        assert mask["embedding"] and mask["unembedding"]
        assert mask["blocks"]["attention"]["query"] and mask["blocks"]["mlp"]["down"]
        assert not any(mask["final_norm"].values())
        assert not mask["blocks"]["attention"].get("offset", False)
        assert not any(mask["blocks"]["attention"]["query_norm"].values())
