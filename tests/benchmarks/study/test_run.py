import dataclasses
import json
import os
import subprocess
import time

import jax
import numpy as np
import pytest

from benchmarks.study import data, measures, programs, run, train
from benchmarks.study.__main__ import main
from benchmarks.study.ledger import Ledger, short_name
from benchmarks.study.settings import Spec, experiment_of
from benchmarks.study.turns import turn
from benchmarks.study.variants import VARIANTS
from lazyattn.checkpoint.load import load_trained
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from lazyattn.model.objective import make_loss_fn
from lazyattn.model.parameters import parameter_shapes
from lazyattn.training.optimizer import make_optimizer, make_schedule
from lazyattn.training.step import make_train_step
from tests.benchmarks.study.made_up import TINY, write_tokens

KEYS = """
variant seed parameters tokens learning_rate device val_rfc val_code val_books
val_by_position copy passkey val_2x val_4x ms_per_step visited_4096 live_4096
visited_16384 live_16384 sink mass spans commit curve visited_in_training kurtosis
slopes offsets jax date seconds_compile settings epochs
"""
STEPS, BATCH, LENGTH = 4, 2, 64


@pytest.fixture(autouse=True, scope="module")
def few_tokens_a_batch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.study.scorer.BATCH_TOKENS", 512)
        patch.setattr("benchmarks.study.measures.COPY_ROWS", 4)
        patch.setattr("benchmarks.study.measures.PASSKEY_ROWS", 4)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("study") / "data")


def _options(folder, tmp_path, **changes):
    asked = {
        "data": folder,
        "variants": ("paper",),
        "seeds": (0, 1),
        "learning_rates": (1e-2,),
        "tokens": STEPS * BATCH * LENGTH,
        "output": tmp_path / "lines.jsonl",
        "length": LENGTH,
        "batch": BATCH,
        "overrides": TINY,
        "commit": "abc",
    }
    return run.Options(**(asked | changes))


def _lines(options):
    return [json.loads(line) for line in options.output.read_text().splitlines()]


@pytest.mark.slow
def test_a_line_a_run_once(folder, tmp_path, capsys):
    options = _options(folder, tmp_path, workdir=tmp_path / "work", turn=tmp_path / "turn")
    assert run.run(options) == 2
    first, second = _lines(options)
    for line in (first, second):
        assert set(KEYS.split()) <= set(line)
        assert "error" not in line
        assert line["commit"] == "abc"
        assert line["epochs"] == pytest.approx(8 / 62, abs=1e-4)
        tokens = [point[0] for point in line["curve"]]
        assert tokens == [BATCH * LENGTH * n for n in range(1, STEPS + 1)]
        # Random tokens of 297 kinds, hardly trained.
        assert 5 < line["val"] < 7
        assert line["val"] == pytest.approx(
            (line["val_rfc"] + line["val_code"] + line["val_books"]) / 3
        )
        assert set(line["copy"]) == {"33", "nothing"}
        assert all(0 <= share <= 1 for share in line["passkey"].values())
        assert 0 < line["live_4096"] <= line["visited_4096"] <= 1
        assert 0 < line["mass"] < 1
        assert np.shape(line["offsets"]) == np.shape(line["slopes"]) == (1, 2)
        assert np.shape(line["spans"]) == (1, 2)
    assert first["seed"] == 0
    assert second["seed"] == 1
    assert first["curve"][0][2] != second["curve"][0][2]
    assert run.run(options) == 0
    assert "2 runs, 2 of them finished before" in capsys.readouterr().err
    assert len(_lines(options)) == 2
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["claims"]


@pytest.mark.slow
def test_a_run_that_is_kept_can_be_loaded(tmp_path):
    folder = write_tokens(tmp_path / "data")
    options = _options(folder, tmp_path, seeds=(0,), workdir=tmp_path / "work", keep=True)
    with pytest.raises(InputError, match=r"--data is .* a folder with tokenizer.json"):
        run.run(options)
    with pytest.raises(InputError, match="--keep is True, but it must be given with --workdir"):
        run.run(dataclasses.replace(options, workdir=None))
    Tokenizer.train(["a few words, for a tokenizer"], 280).save(
        tmp_path / "data" / "tokenizer.json"
    )
    assert run.run(options) == 1
    trained = load_trained(tmp_path / "work" / short_name(options.specs()[0].identity))
    assert trained.step == STEPS
    assert trained.experiment.model.width == 16


def test_a_line_says_why_it_failed(folder, tmp_path, monkeypatch):
    options = _options(folder, tmp_path, seeds=(0,), measure="loss")

    def burst(*args):
        raise train.NonFiniteError("non-finite: 10 steps in a row")

    monkeypatch.setattr(run.Study, "_line", burst)
    assert run.run(options) == 1
    (line,) = _lines(options)
    assert line["error"] == "non-finite: 10 steps in a row"
    assert line["seed"] == 0
    assert run.run(options) == 0  # it would come again

    options = dataclasses.replace(options, seeds=(1,))
    monkeypatch.setattr(run.Study, "_line", lambda *args: 1 / 0)
    assert run.run(options) == 1
    assert _lines(options)[-1]["error"] == "ZeroDivisionError: division by zero"
    assert run.run(options) == 1  # that is tried again


def test_nothing_is_begun_after_the_deadline(folder, tmp_path):
    options = _options(folder, tmp_path, deadline=10.0, elapsed=lambda: 9.0, measure="loss")
    assert run.run(options) == 0
    assert not options.output.exists()


@pytest.fixture(scope="module")
def ready(folder):
    spec = Spec("paper", 0, 6 * BATCH * LENGTH, 1e-2, None, BATCH, LENGTH, TINY)
    experiment = experiment_of(spec)
    tokens = data.read(folder)
    compiler = programs.Compiler()
    made = programs.Programs(
        compiler, experiment, eos=2, tokens=tokens.train.size, mesh=run.one_device()
    )
    starts = train.order_of(tokens, experiment).starts
    found = measures.material(tokens, LENGTH, folder)
    yield made, experiment, train.Course(made.put(tokens.train), made.put(starts), found)
    compiler.close()


@pytest.mark.slow
def test_a_cut_run_goes_on_bit_exactly(ready, tmp_path):
    made, experiment, course = ready
    whole, history = train.train(made, experiment, course, workdir=None, looks=False)
    with pytest.raises(train.Cut, match="at step 3 of 6"):
        train.train(
            *(made, experiment, course),
            workdir=tmp_path,
            looks=False,
            stop=lambda step, seconds: step >= 3,
        )
    said = []
    state, resumed = train.train(
        *(made, experiment, course), workdir=tmp_path, looks=False, said=said.append
    )
    assert said[0] == "goes on at step 3"
    jax.tree.map(np.testing.assert_array_equal, state, whole)
    assert [(p[0], p[2]) for p in resumed.curve] == [(p[0], p[2]) for p in history.curve]
    assert resumed.seconds > 0


@pytest.mark.slow
def test_steps_are_those_of_the_trainers_optimizer(ready):
    made, experiment, course = ready
    state, _ = train.train(made, experiment, course, workdir=None, looks=False)
    factory = programs.StateFactory(
        lambda key: programs.init_params(made._initial, key),
        made._specs,
        make_optimizer(experiment.optimizer, 6),
        made._mesh,
        0,
    )
    step = make_train_step(
        make_loss_fn(experiment.model),
        make_optimizer(experiment.optimizer, 6),
        make_schedule(experiment.optimizer, 6),
        mesh=made._mesh,
        shardings=factory.shardings,
    )
    theirs = factory.create()
    for n in range(6):
        theirs, _ = step(theirs, made.cut().result().run(course.stream, course.starts, np.int32(n)))
    before = factory.create().params
    moved = jax.tree.map(lambda x, y: float(abs(x - y).max()), theirs.params, before)
    assert max(jax.tree.leaves(moved)) > 1e-2
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), state.params, theirs.params
    )


@pytest.mark.slow
def test_trial(folder, capsys):
    flags = [f"--set={name}={text}" for name, text in TINY]
    argv = ["x", "trial", f"--data={folder}", "--variants=softmax", "--batch=2", "--length=64"]
    argv += [*flags, "--try=model.remat=dots batch=1", "--steps=2", "--rounds=1"]
    assert main(argv) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["batch"] == 1
    assert line["settings"].endswith("model.remat=dots")
    assert line["ms_per_step"] > 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--variants=mamba", "--variants is 'mamba', but it must be one of softmax"),
        ("--variants=paper,paper", "without repetition"),
        ("--seeds=a", "--seeds is 'a'"),
        ("--tokens=many", "--tokens is 'many'"),
        ("--tokens=10", "--tokens is 10, but it must be at least 65536"),
        ("--set=model.remat", "--set is 'model.remat'"),
        ("--set=model.remats=dots", "config.model.remats is unknown"),
        ("--measure=some", "--measure is 'some'"),
        ("--deadline=0", "--deadline is 0.0"),
        ("--variant=paper", "Unknown command line flag 'variant'"),
        ("paper", "The argument 'paper' is not a flag"),
    ],
)
def test_bad_input_is_one_sentence(flag, message, folder, capsys, tmp_path):
    argv = ["x", "run", f"--data={folder}", f"--output={tmp_path / 'x.jsonl'}", flag]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_command(capsys):
    assert main(["x", "fly"]) == 2
    assert "the command is 'fly', but it must be one of run" in capsys.readouterr().err


def test_claims_between_processes(tmp_path):
    ledger = Ledger(tmp_path / "lines.jsonl", tmp_path / "claims")
    other = subprocess.Popen(["sleep", "60"])
    claim = tmp_path / "claims" / short_name("paper seed=0")
    try:
        claim.write_text(f"{other.pid} ")
        assert not ledger.claim("paper seed=0", steal=True)
        claim.write_text(f"{other.pid} ahead")
        assert not ledger.claim("paper seed=0")
        assert not ledger.claim("paper seed=0", ahead=True)
        assert ledger.claim("paper seed=0", steal=True)
        assert ledger.claim("paper seed=0")
        claim.write_text(f"{other.pid} ")
    finally:
        other.kill()
        other.wait()
    assert ledger.claim("paper seed=0")  # its owner lives no more
    assert claim.read_text() == f"{os.getpid()} "


def test_turns_are_waited_for(tmp_path):
    file, asked = tmp_path / "turn", iter([False, False, True])
    with turn(file, lambda: False) as mine:
        assert mine
        with turn(file, lambda: next(asked)) as theirs:
            assert not theirs
    assert next(asked, None) is None
    with turn(file, lambda: False) as mine:
        assert mine


@pytest.mark.slow
def test_no_run_is_begun_when_its_turn_comes_too_late(folder, tmp_path, capsys):
    options = _options(
        folder, tmp_path, workdir=tmp_path / "work", turn=tmp_path / "turn", deadline=150.0
    )
    # Time is there when the run is looked at, and over when it has waited.
    times = iter([0.0, 0.0])
    options = dataclasses.replace(options, elapsed=lambda: next(times, 149.0))
    with turn(tmp_path / "turn", lambda: False):
        assert run.run(options) == 0
    assert not options.output.exists()
    assert "before its turn came" in capsys.readouterr().err


def test_timing_waits_for_compiling():
    compiler = programs.Compiler()

    class Slow:
        def memory_analysis(self):
            return None

    def make():
        time.sleep(0.3)
        return Slow()

    future = compiler.submit("x", make)
    time.sleep(0.1)
    with compiler.quiet():
        # The lock is let go just before the future is set.
        time.sleep(0.05)
        assert future.done()
    assert compiler.submit("x", make) is future
    compiler.close()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_model_of_46_million(variant):
    experiment = experiment_of(Spec(variant, 0, 10**8, 2e-3))
    shapes = jax.tree.leaves(parameter_shapes(experiment.model))
    size = sum(shape.size for shape in shapes)
    gate = 12 * 512 * 512 if variant.endswith("_gate") else 0
    assert 45.7e6 + gate < size < 45.9e6 + gate
    assert experiment.training.steps == 1526
    assert experiment.optimizer.warmup_steps == 76


@pytest.mark.slow
def test_unrolled_layers_are_measured_as_scanned_ones_and_attention_is_timed(folder, tmp_path):
    tokens = 2 * BATCH * LENGTH
    more = {"variants": ("sharp",), "seeds": (0,), "tokens": tokens}
    scanned = _options(folder, tmp_path / "scanned", **more)
    unrolled = (*TINY, ("model.scan_layers", "False"))
    unrolled = _options(
        folder, tmp_path / "unrolled", **more, overrides=unrolled, time_attention=True
    )
    for options in (scanned, unrolled):
        options.output.parent.mkdir()
        assert run.run(options) == 1
    (first,), (second,) = _lines(scanned), _lines(unrolled)
    # Seeds are dealt to the layers differently, so that only sizes can be compared.
    assert first["parameters"] == second["parameters"]
    assert first["val"] == pytest.approx(second["val"], abs=0.2)
    assert set(second["attention_ms"]) == {f"1x{LENGTH}", f"1x{4 * LENGTH}"}
    for found in second["attention_ms"].values():
        assert min(found["forward"], found["training"], found["softmax_training"]) > 0


def test_seeds_or_variants_come_first(folder, tmp_path):
    asked = {"variants": ("sharp", "paper"), "seeds": (0, 1)}
    order = [(s.variant, s.seed) for s in _options(folder, tmp_path, **asked).specs()]
    assert order == [("sharp", 0), ("paper", 0), ("sharp", 1), ("paper", 1)]
    order = [
        (s.variant, s.seed) for s in _options(folder, tmp_path, **asked, first="seeds").specs()
    ]
    assert order == [("sharp", 0), ("sharp", 1), ("paper", 0), ("paper", 1)]
