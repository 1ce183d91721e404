"""Run by test_scoring_mesh.py in a process of its own, with four simulated devices.

Prints one JSON object: the largest difference to one device, and what was compiled.
"""

import json
import sys

import jax
import numpy as np

from lazyattn import sharding
from lazyattn.eval.scoring import Scorer
from lazyattn.model.parameters import partition_specs
from tests.model.tiny import make_config, make_params


def main() -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    config = make_config(vocab_size=32, attention={"implementation": "xla_chunked"})
    params = make_params(config)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(32, size=length) for length in (70, 9, 64, 90, 30, 2, 80)]
    one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    expected = Scorer(params, config, one, batch_tokens=256)(sequences, context=96)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=2))
    specs = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), partition_specs(config))
    scorer = Scorer(jax.device_put(params, specs), config, mesh, batch_tokens=256)
    found = scorer(sequences, context=96)
    report = {
        "difference": max(
            float(np.abs(a.nll - b.nll).max()) for a, b in zip(found, expected, strict=True)
        ),
        "greedy": all((a.greedy == b.greedy).all() for a, b in zip(found, expected, strict=True)),
        "compilations": scorer.compilations,
        "rows": scorer.rows(96),
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
