"""The loop of docs/decoding.md: requests come and go, and each gets what it would get alone."""

import pathlib
import re

import jax
import numpy as np

from lazyattn.generation import SamplingConfig, generate
from tests.model.tiny import VOCAB, make_config, make_params

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "decoding.md"


def test_continuous_batching():
    (code,) = (
        c for c in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "def s" in c
    )
    space = {}
    exec(code, space)
    config = make_config(attention={"qk_norm": True})
    params = make_params(config)
    rng = np.random.default_rng(3)
    requests = {
        f"request {n}": rng.integers(VOCAB, size=size) for n, size in enumerate((5, 12, 1, 7, 3))
    }
    greedy = SamplingConfig(max_new_tokens=9, temperature=0.0)
    wanted, eos_id = {}, None
    prompts = np.zeros((5, 12), int)
    for row, prompt in zip(prompts, requests.values(), strict=True):
        row[: len(prompt)] = prompt
    lengths = [len(prompt) for prompt in requests.values()]
    how = {"sampling": greedy, "key": jax.random.key(0)}
    free = np.asarray(generate(params, config, prompts, np.array(lengths), **how).tokens)
    eos_id = int(free[1, 3])  # so that requests end at different times
    for name, row in zip(requests, free.tolist(), strict=True):
        wanted[name] = row[: row.index(eos_id)] if eos_id in row else row
    found = space["serve"](
        params, config, requests.items(), eos_id=eos_id, new=9, rows=2, width=12, sampling=greedy
    )
    assert dict(found) == wanted
    assert len({len(row) for row in wanted.values()}) > 1
