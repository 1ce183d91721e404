"""Runs whose products are in float8."""

import json

import jax
import numpy as np
import pytest

from lazyattn.checkpoint.load import load_trained
from lazyattn.experiment import from_config_dict
from tests.training import tiny


def _experiment(text, steps, **training):
    config = tiny.get_config(text)
    config.model.num_layers = 2
    config.training.update({"steps": steps, "microbatches": 2, "eval_batches": 1, **training})
    config.training.checkpoint_every = 2
    return from_config_dict(config)


def _losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_a_run_of_float8_resumes_bit_exactly_and_may_go_on_without(tmp_path):
    text, cache = tiny.write_text(tmp_path / "text"), tmp_path / "cache"
    before = tmp_path / "before"
    assert tiny.train(_experiment(text, 2), before, cache) == 0
    begun = {"init_from": str(before), "quantization": "fp8"}
    for name, steps in (("whole", (4,)), ("halves", (2, 4))):
        for last in steps:
            assert tiny.train(_experiment(text, last, **begun), tmp_path / name, cache) == 0
    whole, halves = (load_trained(tmp_path / name) for name in ("whole", "halves"))
    jax.tree.map(np.testing.assert_array_equal, whole.params, halves.params)
    assert _losses(tmp_path / "whole") == _losses(tmp_path / "halves")

    assert tiny.train(_experiment(text, 4, init_from=str(before)), tmp_path / "plain", cache) == 0
    plain, rounded = _losses(tmp_path / "plain"), _losses(tmp_path / "whole")
    assert all(0 < abs(a / b - 1) < 0.01 for a, b in zip(plain, rounded, strict=True))
    went_on = _experiment(text, 6, init_from=str(before))
    assert tiny.train(went_on, tmp_path / "halves", cache) == 0
    assert len(_losses(tmp_path / "halves")) == 6
