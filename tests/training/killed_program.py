"""Trains with a process for each GPU, kills one, resumes: are the losses the same bit for bit?

    python -m tests.training.killed_program --meshes=fsdp:2,tensor:2,sequence:2 [flags of train.py]

All meshes are tried at the same time, on the same GPUs. A process is killed (SIGKILL) some steps
after a checkpoint, and the other ones after it. The losses of those steps, which are taken again
from the checkpoint, must be the same. A JSON line for each mesh goes to --output; the status is 1
if one differs. XLA must be told to be deterministic; `--simulated` is for a try without GPUs.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.training import tiny
from tests.training.test_processes import Shell

DETERMINISTIC = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
AGAIN = 4  # steps past the checkpoint, at least


def killed_and_resumed(shell, mesh, count, every, seconds, overrides):
    """Returns a record of one mesh, such as "fsdp:2"."""
    sizes = dict(part.split(":") for part in mesh.split("+"))
    name = re.sub(r"\W", "_", mesh)
    flags = [
        "--config.mesh.data=1",
        *(f"--config.mesh.{axis}={size}" for axis, size in sizes.items()),
        f"--config.training.checkpoint_every={every}",
        "--config.training.steps=100000",
        *overrides,
    ]
    checkpoint = shell.folder / name / "checkpoints" / str(every)

    def until(enough):
        """Runs until there is enough, then kills; returns the losses and the seconds it took."""
        processes = shell.start(name, count, *flags, devices=1)
        began = time.monotonic()
        try:
            while not enough(shell.losses(name)):
                ended = [process for process in processes if process.poll() is not None]
                if ended:
                    raise RuntimeError(ended[0].communicate()[1][-2000:])
                if time.monotonic() - began > seconds:
                    raise TimeoutError(f"after {seconds} s: {shell.losses(name)}")
                time.sleep(0.02)
            took = time.monotonic() - began
            processes[-1].kill()
            time.sleep(0.5)
        finally:
            for process in processes:
                process.kill()
            printed = [process.communicate()[0] for process in processes]
        return shell.losses(name), took, printed[0]

    before, first, _ = until(
        lambda found: max(found, default=0) >= every + AGAIN and checkpoint.is_dir()
    )
    killed_at = max(before)
    (shell.folder / name / "metrics.jsonl").unlink()
    after, second, out = until(lambda found: max(found, default=0) >= killed_at)
    resumed = int(re.search(r"resuming after step (\d+)", out)[1])
    steps = range(resumed + 1, killed_at + 1)
    return {
        "mesh": mesh,
        "processes": count,
        "killed_after": killed_at,
        "resumed_after": resumed,
        "compared": len(steps),
        "same": bool(steps) and all(before[step] == after.get(step) for step in steps),
        "last_loss": before[killed_at],
        "seconds_to_kill": first,
        "seconds_to_same_step": second,
        "flags": overrides,
    }


def main():
    """Returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--meshes", default="fsdp:2,tensor:2,sequence:2")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--simulated", action="store_true")
    parser.add_argument("--output", type=Path)
    options, overrides = parser.parse_known_args()
    if not options.simulated:
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}"
    folder = Path(tempfile.mkdtemp())
    tiny.write_text(folder / "text")
    shell = Shell(folder, gpus=not options.simulated)

    def record(mesh):
        try:
            found = killed_and_resumed(
                shell, mesh, options.processes, options.every, options.seconds, overrides
            )
        except (RuntimeError, TimeoutError) as error:
            found = {"mesh": mesh, "same": False, "error": str(error)}
        print(json.dumps(found), flush=True)
        if options.output:
            with options.output.open("a") as file:
                file.write(json.dumps(found) + "\n")
        return found["same"]

    meshes = options.meshes.split(",")
    with ThreadPoolExecutor(len(meshes)) as pool:
        same = list(pool.map(record, meshes))
    shutil.rmtree(folder)
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
