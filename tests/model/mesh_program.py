"""Run by test_mesh.py in a process of its own, with eight simulated devices.

Prints one JSON object: for each check the largest relative difference between the mesh
and one device, or the message of the expected error.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from lazyattn import sharding
from lazyattn.errors import InputError
from lazyattn.generation.decode import generate
from lazyattn.generation.sampling import SamplingConfig
from lazyattn.model.loss import cross_entropy
from lazyattn.model.parameters import partition_specs
from lazyattn.model.transformer import Transformer, attention_weights, output_embedding
from tests.model.tiny import make_batch, make_config, make_params


def difference(found, expected):
    """Returns the largest difference of two trees, each array's relative to its largest entry."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / (np.abs(b).max() + 1e-9)) for a, b in pairs)


def global_heads_report(batch):
    """Compares a mesh, which shares rows out too, where some heads have a window."""
    attention = {"num_kv_heads": 4, "global_share": 0.5, "global_rope": False, "window": 3}
    attention |= {"output_gate": True, "implementation": "xla_chunked"}
    config = make_config(vocab_size=32, attention=attention)
    params = make_params(config)
    inputs, ids = (jnp.pad(batch[name], ((0, 0), (0, 1))) for name in ("inputs", "segment_ids"))

    def loss(params):
        hidden = Transformer(config).apply({"params": params}, inputs, ids)
        return jnp.sum(jnp.sin(hidden) * (ids > 0)[..., None])

    prompt, lengths = np.asarray(inputs[:2, :5]), np.array([4, 5])
    greedy = {"sampling": SamplingConfig(6, temperature=0.0), "key": jax.random.key(0)}

    def results(params):
        gradient = jax.jit(jax.value_and_grad(loss))(params)
        tokens = generate(params, config, prompt, lengths, **greedy).tokens
        return gradient, tokens, jax.jit(attention_weights, static_argnums=1)(params, config, ids)

    expected = results(params)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=2, sequence=2))
    specs = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), partition_specs(config))
    with jax.set_mesh(mesh):
        found = results(jax.device_put(params, specs))
    report = {
        "window_gradients": difference(found[0], expected[0]),
        "window_tokens": bool(jnp.array_equal(found[1], expected[1])),
        "window_weights": difference(found[2], expected[2]),
    }
    try:
        with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, tensor=4))):
            jax.eval_shape(loss, params)
    except InputError as error:
        report["window_error"] = str(error)
    return report


def main() -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.device_count() == 8
    attention = {"implementation": "xla_chunked", "qk_norm": True}
    config = make_config(vocab_size=32, attention=attention)
    params = make_params(config)
    batch = make_batch(rows=8)

    def loss(params, batch):
        hidden = Transformer(config).apply(
            {"params": params}, batch["inputs"], batch["segment_ids"]
        )
        weights = batch["segment_ids"] > 0
        sums = cross_entropy(
            hidden,
            output_embedding(params, config),
            batch["targets"],
            weights,
            chunk=config.loss_positions,
            z_loss=1e-2,
        )
        return sums.objective, (sums, hidden)

    gradient = jax.value_and_grad(loss, has_aux=True)
    expected = jax.jit(gradient)(params, batch)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    specs = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), partition_specs(config))
    placed = jax.device_put(params, specs)
    rows = jax.device_put(batch, jax.sharding.NamedSharding(mesh, sharding.spec("batch")))
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradient, out_shardings=((None, None), specs))
        found = compiled(placed, rows)
        hidden = found[0][1][1]
    report = {
        "loss": difference(found[0], expected[0]),
        "gradients": difference(found[1], expected[1]),
        "rows_of_hidden_states": hidden.addressable_shards[0].data.shape[0],
    }

    prompt, lengths = np.asarray(batch["inputs"][:1, :5]), np.array([4])
    greedy = {"sampling": SamplingConfig(6, temperature=0.0), "key": jax.random.key(0)}
    expected_tokens = generate(params, config, prompt, lengths, **greedy)
    short = batch["inputs"][:2]
    expected_weights = jax.jit(attention_weights, static_argnums=1)(params, config, short)
    with jax.set_mesh(mesh):
        found_tokens = generate(placed, config, prompt, lengths, **greedy)
        found_weights = jax.jit(attention_weights, static_argnums=1)(placed, config, short)
    report["one_prompt"] = bool(jnp.array_equal(found_tokens.tokens, expected_tokens.tokens))
    report["weights"] = difference(found_weights, expected_weights)

    report |= global_heads_report(batch)

    try:
        with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=1, tensor=8))):
            jax.eval_shape(loss, params, batch)
    except InputError as error:
        report["error"] = str(error)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
