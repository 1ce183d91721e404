"""--mode=export on a run that was never trained: what it writes, and what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lazyattn.checkpoint.load import load_trained
from lazyattn.errors import InputError
from lazyattn.export.card import model_card
from lazyattn.export.flags import ExportOptions
from lazyattn.export.main import export
from lazyattn.pretrained.load import load_model, load_safetensors
from lazyattn.pretrained.parameters import as_table
from lazyattn.pretrained.settings import Facts
from tests.eval.runs import make_run
from tests.model.tiny import make_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def trained(run):
    return load_trained(run)


@pytest.fixture(scope="module")
def exported(run):
    pytest.importorskip("safetensors")
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "validation_loss": 3.25, "validation_tokens": 20480}\n'
        '{"step": 2, "validation_loss": 9.0}\n{"st'
    )
    return export(run, options=ExportOptions(formats=("orbax", "safetensors")))


def _assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_folder_holds_all_one_needs(run, exported, trained):
    assert exported == run / "export"
    assert sorted(path.name for path in exported.iterdir()) == [
        *("README.md", "config.json", "model.safetensors", "params", "tokenizer.json")
    ]
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    model = load_model(exported)
    _assert_equal(model.params, trained.params)
    assert model.tokenizer.fingerprint == trained.tokenizer.fingerprint
    facts = model.facts
    assert (facts.step, facts.tokens, facts.sequence_length) == (1, 64, 16)
    said = json.loads((exported / "config.json").read_text())
    assert (said["model_type"], said["num_heads"], said["max_bias_length"]) == ("swat", 2, 8)
    assert said["lazyattn"]["model"]["attention"]["variant"] == "lazy"


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770)])
def test_permissions_are_those_of_any_new_file(run, tmp_path, mask, file, folder):
    pytest.importorskip("safetensors")
    before = os.umask(mask)
    try:
        options = ExportOptions(formats=("orbax", "safetensors"), output=str(tmp_path / "made"))
        made = export(run, options=options)
    finally:
        os.umask(before)
    wrong = [
        (path.name, oct(path.stat().st_mode))
        for path in (made, *made.rglob("*"))
        if path.stat().st_mode & 0o777 != (folder if path.is_dir() else file)
    ]
    assert wrong == []


def test_the_card_says_what_is_known_and_no_folder_of_this_machine(run, exported):
    text = (exported / "README.md").read_text()
    for expected in (
        "library_name: lazyattn",
        "| steps of training | 1 |",
        "| tokens in training | 64 |",
        "| text | text |",
        "| distance bias | `decay`: -exp(theta) x + delta, delta of 8 distances; it falls past",
        "| validation loss | 3.2500 nats a token, over 20,480 tokens held out |",
        "`params/` is an Orbax checkpoint",
        "There it is not the same function:",
        "0 from distance 8 on",
    ):
        assert expected in text
    assert str(run.parent) not in text + (exported / "config.json").read_text()


@pytest.mark.parametrize(
    ("attention", "rows"),
    [
        ({"bias_kind": "table"}, ["distance bias | `table`: 6 distances, with a learned tail"]),
        ({"bias_kind": "table", "bias_tail": False}, ["`table`: 6 distances, 0 past them"]),
        (
            {"global_share": 0.5, "global_rope": False, "window": 3},
            ["| window | 3 keys |", "| global heads | 2 of 4, no slope, no window, no RoPE |"],
        ),
        ({"global_share": 0.25}, ["| global heads | 1 of 4, no slope |"]),
        ({"qk_norm": True, "output_gate": True}, ["norms of queries and keys, a gate on the"]),
    ],
    ids=str,
)
def test_the_card_says_which_attention_it_is(attention, rows):
    facts = Facts(make_config(attention=attention), sequence_length=8)
    text = model_card(
        "x", facts, dtype="float32", layout="unsharded", formats=["orbax"], tokenizer=False
    )
    assert all(row in text for row in rows), text


def test_bfloat16_rounds_matrices_and_keeps_the_rest(run, trained, tmp_path):
    folder = export(run, options=ExportOptions(dtype="bfloat16", output=str(tmp_path / "out")))
    with ocp.PyTreeCheckpointer() as checkpointer:  # any reader of Orbax can have it
        stored = checkpointer.restore(folder / "params")
    attention, expected = stored["blocks"]["attention"], trained.params["blocks"]["attention"]
    assert attention["query"].dtype == jnp.bfloat16
    for name in ("distance_delta", "distance_log_slope", "offset"):
        assert attention[name].dtype == jnp.float32
        np.testing.assert_array_equal(attention[name], expected[name])
    rounded = load_model(folder).params["blocks"]["attention"]["query"]
    assert rounded.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, expected["query"].astype(jnp.bfloat16))


def test_safetensors_come_back_as_orbax(exported, trained, tmp_path):
    options = ExportOptions(import_from=str(exported), output=str(tmp_path / "back"))
    model = load_model(export(None, options=options))
    attention = model.config.attention
    assert (attention.bias_kind, attention.has_tail) == ("table", True)
    expected, _ = as_table(trained.params, trained.experiment.model)
    _assert_equal(model.params, expected)
    assert model.tokenizer is not None


def test_a_bias_without_its_tail(run, tmp_path):
    options = ExportOptions(formats=("safetensors",), bias_length=16, output=str(tmp_path / "out"))
    pytest.importorskip("safetensors")
    model = load_model(export(run, options=options))
    assert model.config.attention.bias_kind == "table"
    assert not model.config.attention.has_tail
    assert model.params["blocks"]["attention"]["distance_bias"].shape == (1, 2, 16)
    assert "There it is the same function" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--output is '{run}/export', but it must be a folder that does not exist yet, or is"),
        ({"output": "{run}/tokenizer.json"}, "tokenizer.json', but it must be a folder that does"),
        ({"output": "{run}/tokenizer.json/x"}, "but it must be a folder that can be made"),
        ({"dtype": "float16"}, "--dtype is 'float16', but it must be float32 or bfloat16"),
        ({"layout": "flat"}, "--layout is 'flat', but it must be unsharded or sharded"),
        ({"formats": ("onnx",)}, "--formats is 'onnx', but it must be orbax, safetensors, or"),
        ({"formats": ()}, "--formats is '', but it must be orbax, safetensors, or both"),
        ({"bias_length": 0}, "--bias_length is 0, but it must be at least 1"),
        (
            {"bias_length": 7, "output": "{run}/new"},
            "--bias_length is 7, but it must be at least 8",
        ),
        ({"import_from": "x"}, "--output is not given, but --import_from needs it"),
        ({"import_from": "/no", "output": "{run}/new"}, "--import_from is '/no', but it must be a"),
    ],
)
def test_mistakes_are_one_sentence(run, exported, options, message):
    def filled(value):
        return value.format(run=run) if isinstance(value, str) else value

    before = sorted(run.iterdir())
    with pytest.raises(InputError, match=re.escape(filled(message))) as caught:
        export(run, options=ExportOptions(**{name: filled(v) for name, v in options.items()}))
    assert "\n" not in str(caught.value)
    assert sorted(run.iterdir()) == before


def test_without_a_checkpoint(tmp_path):
    for layout in ("unsharded", "sharded"):
        with pytest.raises(InputError, match=r"--workdir is .* the folder of a run with a checkp"):
            export(tmp_path, options=ExportOptions(layout=layout))
    assert not list(tmp_path.iterdir())


def test_parameters_that_are_damaged(exported, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    shutil.rmtree(folder / "params")
    (folder / "params").mkdir()
    with pytest.raises(InputError, match=r"The parameters in '.*params' can't be read") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="The folder of the model is '/no', but it must be a"):
        load_model("/no")


def _python(arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_sharded_by_the_command_line_and_read_without_the_trainer(run, tmp_path):
    """docs/export.md's lines as they stand there, and a mesh, on what eight devices wrote."""
    _python(
        [
            *("train.py", "--mode=export", f"--workdir={run}", f"--output={tmp_path / 'mine'}"),
            *("--layout=sharded", "--formats=orbax,safetensors"),
        ],
        JAX_NUM_CPU_DEVICES="8",
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(tmp_path / "mine" / "params").item_metadata.tree
    assert stored["embedding"].storage.write_shape == (280, 2)  # of 16 columns
    text = (ROOT / "docs" / "export.md").read_text()
    first, second, *_ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in first.splitlines() if line.strip()]) == 5
    program = (first + second).replace("exports/mine", str(tmp_path / "mine"))
    program += """
import sys
import jax
from lazyattn.sharding import MeshConfig, make_mesh
shared = load_model(FOLDER, make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
assert {s.data.shape for s in shared.params["embedding"].addressable_shards} == {(140, 4)}
np.testing.assert_allclose(shared.logits(tokens), logits, rtol=1e-4, atol=1e-5)
assert not {"optax", "grain", "lazyattn.training.loop"} & set(sys.modules)
np.save(sys.argv[1], logits)
""".replace("FOLDER", repr(str(tmp_path / "mine")))
    out = _python(["-c", program, str(tmp_path / "logits.npy")], JAX_NUM_CPU_DEVICES="8")
    assert out.strip()
    trained = load_trained(run)
    model = load_model(tmp_path / "mine")
    _assert_equal(model.params, trained.params)
    gathered, _ = as_table(trained.params, model.config)
    _assert_equal(load_safetensors(tmp_path / "mine").params, gathered)
    tokens = [[model.tokenizer.bos_id, *model.tokenizer.encode("The ")]]
    expected = model.logits(np.array(tokens))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=1e-4, atol=1e-5)


def test_the_name_of_the_end_of_a_document_goes_along(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    (tmp_path / "run" / "tokenizer_config.json").write_text('{"eos_token": "<|pad|>"}')
    exported = export(tmp_path / "run", options=ExportOptions(formats=("orbax",)))
    assert json.loads((exported / "tokenizer_config.json").read_text())["eos_token"] == "<|pad|>"
    assert load_model(exported).tokenizer.eos_id == 0
