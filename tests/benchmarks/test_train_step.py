import json

import jax
import numpy as np
import pytest
from absl import flags

from benchmarks import softmax_by_jax, train_step
from lazyattn import command_line, lazy_attention, sharding
from lazyattn.data.config import DataConfig
from lazyattn.experiment import ExperimentConfig
from lazyattn.model import sharded_attention
from lazyattn.model.config import ModelConfig

TINY = (
    "--config=configs/fineweb_edu.py:lazy_340m_10b",
    "--config.model.vocab_size=260",
    "--config.data.vocab_size=260",
    "--config.model.width=16",
    "--config.model.num_layers=1",
    "--config.model.remat=none",
    "--config.model.scan_layers=false",
    "--config.model.attention.num_heads=2",
    "--config.model.attention.bias_width=16",
    "--config.model.attention.implementation=xla",
    "--config.mesh.fsdp=1",
    "--batch=4",
    "--length=32",
    "--steps=2",
    "--rounds=2",
)


@pytest.mark.slow
def test_table_and_files(tmp_path, monkeypatch):
    traced = []

    def softmax(*args, stand_in=softmax_by_jax.attention, **rest):
        traced.append(args[0].shape)
        return stand_in(*args, **rest)

    monkeypatch.setattr(softmax_by_jax, "attention", softmax)
    op = sharded_attention.lazy_attention
    values = flags.FlagValues()
    output = tmp_path / "new" / "tiny.v1"
    argv = ["x", *TINY, "--attentions=lazy,cudnn", f"--output={output}"]
    train_step.define(argv, values)
    command_line.parse(argv, values)
    train_step._run(values)
    assert set(traced) == {(4, 32, 2, 8)}  # cudnn's step was traced with it
    assert sharded_attention.lazy_attention is op
    facts = json.loads((tmp_path / "new" / "tiny.v1.json").read_text())
    assert (facts["batch"], facts["length"], facts["microbatches"]) == (4, 32, 1)
    lazy, cudnn = facts["results"]
    for result in (lazy, cudnn):
        assert result["error"] is None
        assert result["steps"] == 1 + 3 * 2
        assert 0 < result["least"] <= result["milliseconds"] <= result["greatest"]
        assert 4 < result["loss"] < 7
        assert result["mfu"] is None  # this machine's peak is not in the table
    # Two heads' tables, slopes and offsets.
    assert lazy["parameters"] == cudnn["parameters"] + 2 * (16 + 1 + 1)
    text = (tmp_path / "new" / "tiny.v1.md").read_text()
    assert text.count("|\n") == 2 + 2
    assert "| 1.000 |" in text


def test_softmax_by_jax_is_our_softmax():
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, 24, 4, 8))
    key, value = (jax.random.normal(k, (2, 24, 2, 8)) for k in keys[1:])
    ours = lazy_attention(query, key, value, implementation="xla")
    theirs = softmax_by_jax.attention(query, key, value, segment_ids=np.ones((2, 24)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="offset"):
        softmax_by_jax.attention(query, key, value, offset=np.zeros(4))


def _experiment():
    data = DataConfig(batch_size=2, sequence_length=64, vocab_size=260)
    return ExperimentConfig(ModelConfig(), data, mesh=sharding.MeshConfig(data=1, fsdp=1))


def test_a_batch_is_whole_rows_of_one_document():
    experiment = train_step.with_batch(_experiment(), 4, 8, None)
    mesh = sharding.make_mesh(experiment.mesh)
    batch = train_step.random_batch(experiment, mesh, np.random.default_rng(0))
    assert {array.shape for array in batch.values()} == {(4, 8)}
    assert (batch["inputs"][:, 1:] == batch["targets"][:, :-1]).all()
    assert (batch["segment_ids"] == 1).all()


def test_a_kind_that_fails_has_a_line(monkeypatch, capsys):
    def refuse(*_, **__):
        raise RuntimeError("no such kernel\nhere")

    monkeypatch.setattr(train_step, "_prepare", refuse)
    (result,) = train_step.measure(_experiment(), ["cudnn"], steps=1, rounds=1)
    assert "no such kernel" in capsys.readouterr().err
    assert "| cudnn | RuntimeError: no such kernel |" in train_step.table([result])


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="--attentions is 'flash', but it must be one of lazy"):
        train_step.measure(_experiment(), ["flash"], steps=1, rounds=1)
