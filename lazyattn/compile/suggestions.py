"""Which settings make a step smaller, in the order in which to try them."""

from collections.abc import Mapping

from lazyattn.experiment import ExperimentConfig
from lazyattn.quantity import quantity


def suggest(
    experiment: ExperimentConfig,
    mesh: Mapping[str, int],
    *,
    state: float,
    available: float,
    parameters: int,
) -> tuple[str, ...]:
    """Returns settings to change, as they are typed, each with its effect.

    Args:
      experiment: the settings that did not fit.
      mesh: mesh axis -> devices.
      state: bytes a device of parameters and optimiser.
      available: bytes of a device.
      parameters: of the model.
    """
    shards = mesh.get("fsdp", 1) * mesh.get("tensor", 1)
    devices = 1
    for size in mesh.values():
        devices *= size
    # Gradients, float32, are as large as the parameters, a third of the state.
    least = state * 4 / 3
    found = []
    if least > available:
        if shards < devices and 16 * parameters / devices < available:
            found.append(_spread(mesh, devices))
        else:
            found.append(
                f"more chips: state and gradients alone need {least / 1e9:.1f} GB of"
                f" {available / 1e9:.1f} GB a device"
            )
        return tuple(found)
    if experiment.model.remat != "full":
        found.append("--config.model.remat=full        recompute each block in the backward pass")
    rows = experiment.data.batch_size // (mesh.get("data", 1) * mesh.get("fsdp", 1))
    parts = experiment.training.microbatches
    if rows // parts > 1:
        more = next(n for n in range(2 * parts, rows + 1) if rows % n == 0)
        found.append(
            f"--config.training.microbatches={more}  {quantity(rows // more, 'row')} a device at"
            f" once instead of {rows // parts}"
        )
    if shards < devices and mesh.get("data", 1) > 1:
        found.append(_spread(mesh, devices))
    heads = experiment.model.attention.kv_heads
    tensor = 2 * mesh.get("tensor", 1)
    if heads % tensor == 0 and mesh.get("fsdp", 1) % 2 == 0:
        found.append(
            f"--config.mesh.tensor={tensor} --config.mesh.fsdp={mesh['fsdp'] // 2}"
            "  halve what a device holds of heads and of SwiGLU"
        )
    return tuple(found)


def _spread(mesh: Mapping[str, int], devices: int) -> str:
    rest = devices // mesh.get("tensor", 1) // mesh.get("sequence", 1)
    return (
        f"--config.mesh.data=1 --config.mesh.fsdp={rest}  parameters and optimiser over all devices"
    )
