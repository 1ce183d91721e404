"""What starts runs elsewhere: the Dockerfile and the recipes of docs/pods.md."""

import re
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def _recipe(first_line):
    """Returns the indented text of docs/pods.md that begins with this line."""
    text = (ROOT / "docs/pods.md").read_text()
    begin = text.index("\n    " + first_line) + 1
    end = re.search(r"\n(?! {4}|\n)", text[begin:]).start()
    return textwrap.dedent(text[begin : begin + end])


def test_the_jobset_has_a_pod_for_each_host_of_its_slice():
    recipe = yaml.safe_load(_recipe("apiVersion: jobset"))
    (job,) = recipe["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    sizes = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(sizes[0]) * int(sizes[1]) * int(sizes[2])
    assert spec["parallelism"] == spec["completions"]
    assert chips == spec["completions"] * container["resources"]["limits"]["google.com/tpu"]
    given = yaml.safe_load(_recipe('args: ["--config=lazy_1300m_100b", "--workdir'))["args"]
    assert f"--process_count={spec['completions']}" in given
    host = f"{recipe['metadata']['name']}-{job['name']}-0-0.{recipe['metadata']['name']}"
    assert f"--coordinator={host}:8476" in given


def test_the_script_for_slurm_is_one_for_bash():
    script = _recipe("#!/bin/bash")
    assert "srun" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_the_dockerfile_copies_what_there_is(device):
    text = (ROOT / "Dockerfile").read_text().replace("${DEVICE}", device)
    copied = re.findall(r"^COPY (\S+)", text, re.MULTILINE)
    required = re.findall(r"-r (\S+)", text)
    assert len(copied) == 3 and len(required) == 2
    for name in (*copied, *required):
        assert (ROOT / name).exists()
