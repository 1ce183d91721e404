"""Runs in buckets, against emulators of Google's and Amazon's that run on this machine."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lazyattn.training.claim import LOCK
from tests.training import tiny

pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.skipif(
            importlib.util.find_spec(package) is None,
            reason=f"{package} is not installed (extra buckets-test)",
        )
        for package in ("gcsfs", "gcp_storage_emulator", "s3fs", "moto", "flask")
    ),
]

ROOT = Path(__file__).parents[1]
STEPS = 24
KINDS = ("gs", "s3")
# Every so many requests fail, each in another way.
FAILS = "9 429 500 503 reset"


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclasses.dataclass
class Buckets:
    """Two buckets called `bucket`, Google's and Amazon's; both can be told to fail."""

    folder: Path
    gcs: str
    s3: str

    def control(self, kind):
        """Returns the folder of what an emulator is told (tests/bucket_faults.py)."""
        return self.folder / f"control-{kind}"

    @contextlib.contextmanager
    def told(self, kind, name, text):
        (self.control(kind) / name).write_text(text)
        try:
            yield
        finally:
            (self.control(kind) / name).unlink()

    def answered(self, kind):
        """Returns what requests were answered in place of what they asked for."""
        path = self.control(kind) / "answered"
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    def start(self, *arguments, program=("train.py",), **environment):
        environment = {
            **os.environ,
            "LAZYATTN_CACHE": str(self.folder / "cache"),
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "STORAGE_EMULATOR_HOST": self.gcs,
            "TENSORSTORE_GCS_HTTP_URL": self.gcs,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "AWS_ENDPOINT_URL": self.s3,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        } | environment
        environment = {name: value for name, value in environment.items() if value}
        return subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def run(self, *arguments, **settings):
        return finish(self.start(*arguments, **settings))

    def train(self, workdir, *overrides, **environment):
        return self.start(
            f"--config={ROOT / 'tests' / 'training' / 'tiny.py'}:{self.folder / 'text'}",
            f"--workdir={workdir}",
            f"--config.training.steps={STEPS}",
            "--config.training.keep=2",
            *overrides,
            **environment,
        )

    def python(self, *lines):
        """Returns what a program of these lines prints, in a process that sees the buckets."""
        text = "\n".join(("from etils import epath", "from pathlib import Path", *lines))
        status, out, err = self.run("-c", text, program=())
        assert status == 0, err
        return out

    def read(self, url):
        return self.python(f"print(epath.Path({url!r}).read_text(), end='')")

    def objects(self, url):
        """Returns the names of all objects below a folder."""
        look = f"print(*fsspec.core.url_to_fs({url!r})[0].find({url!r}), sep='\\n')"
        return set(self.python("import fsspec", look).split())


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def buckets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("buckets")
    for kind in KINDS:
        (folder / f"control-{kind}").mkdir()
    tiny.write_text(folder / "text")
    gcs, s3 = _free_port(), _free_port()
    commands = (
        ["-m", "tests.gcs_program", str(gcs), "bucket", str(folder / "control-gs")],
        ["-m", "tests.s3_program", str(s3), str(folder / "control-s3")],
    )
    with (folder / "servers.log").open("w") as log:
        servers = [
            subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log)
            for command in commands
        ]
    try:
        for port in (gcs, s3):
            _wait_for(port)
        made = Buckets(folder, f"http://127.0.0.1:{gcs}", f"http://127.0.0.1:{s3}")
        made.python("import s3fs", "s3fs.S3FileSystem().mkdir('bucket')")
        yield made
    finally:
        for server in servers:
            server.kill()
            server.wait()


def _wait_for(port):
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def _records(text):
    """Returns what is the same however often a run was killed."""
    timed = ("seconds", "wall_time", "run_began", "useful_seconds", "tokens_per_second")
    rates = ("step_seconds", "memory", "goodput", "lost_to")
    kept = []
    for line in text.splitlines():
        record = json.loads(line)
        kept.append(
            {
                name: value
                for name, value in record.items()
                if name not in timed and not name.startswith(rates)
            }
        )
    return kept


@pytest.fixture(scope="module")
def whole(buckets):
    """A whole run in a folder of this machine."""
    workdir = buckets.folder / "whole"
    status, _, err = finish(buckets.train(workdir))
    assert status == 0, err
    return workdir


@dataclasses.dataclass
class Story:
    """A run in a bucket: killed in two saves, then resumed while requests fail.

    `killed` is what was in the bucket after each; `failed`, how requests did; `left`, what was in
    the bucket at the end.
    """

    kind: str
    run: str
    killed: list[set[str]]
    failed: list[str]
    resumed: tuple[int, str, str]
    left: set[str]


@pytest.fixture(scope="module", params=KINDS)
def story(buckets, request):
    kind, run = request.param, f"{request.param}://bucket/runs/one"
    killed = []
    for last in ("8/state/manifest.ocdbt", "12/commit_success.txt"):
        process = buckets.train(run)
        with buckets.told(kind, "kill", f"{process.pid} checkpoints/{last}"):
            status, _, err = finish(process)
        assert status == -9, err
        killed.append(buckets.objects(run))
    before = len(buckets.answered(kind))
    with buckets.told(kind, "fail", FAILS):
        resumed = finish(buckets.train(run))
    failed = buckets.answered(kind)[before:]
    return Story(kind, run, killed, failed, resumed, buckets.objects(run))


def test_a_run_that_is_killed_in_a_save_resumes_bit_exactly(buckets, whole, story):
    status, out, err = story.resumed
    assert status == 0, err
    early, late = ({name.partition("/checkpoints/")[2] for name in names} for names in story.killed)
    assert "8/commit_success.txt" not in early and "8/state/manifest.ocdbt" not in early
    assert any(name.startswith("8/state/") for name in early)
    # All of step 12 is there but the mark that says so.
    assert {"8/commit_success.txt", "12/state/_METADATA"} <= late
    assert "12/commit_success.txt" not in late
    assert "resuming after step 8\n" in out
    for answer in FAILS.split()[1:]:
        assert story.failed.count(answer) > 2
    lines = buckets.read(f"{story.run}/metrics.jsonl")
    assert _records(lines) == _records((whole / "metrics.jsonl").read_text())
    assert "can't be written" not in err and "could not be written" not in err
    assert "30 s will show whether it is still at work" in err


def test_what_is_in_the_bucket_afterwards(story):
    names = story.left
    below = {name.removeprefix("bucket/runs/one/").split("/")[0] for name in names}
    assert below == {"checkpoints", "config.json", "metrics.jsonl", "tensorboard", "tokenizer.json"}
    steps = {name.split("/")[4] for name in names if "/checkpoints/" in name}
    assert {"20", "24"} <= steps and "12" not in steps


def test_other_modes_read_it(buckets, whole, story, tmp_path):
    at = f"--workdir={story.run}"
    for mode in ("eval", "sample"):
        of_bucket = buckets.run(f"--mode={mode}", at, "--prompt=attention")
        here = buckets.run(f"--mode={mode}", f"--workdir={whole}", "--prompt=attention")
        assert of_bucket[0] == 0, of_bucket[2]
        assert of_bucket[1].replace(story.run, str(whole)) == here[1]
    for mode, name in (("inspect", "inspection/report.html"), ("plot", "plot/loss.svg")):
        status, out, err = buckets.run(f"--mode={mode}", at)
        assert status == 0, err
        assert f"{story.run}/{name.partition('/')[0]}" in out
        assert f"bucket/runs/one/{name}" in buckets.objects(story.run)


@pytest.fixture(scope="module")
def exported(buckets, story):
    """What --mode=export says of the run where no other folder is named."""
    status, out, err = buckets.run("--mode=export", f"--workdir={story.run}")
    assert status == 0, err
    return out


@pytest.mark.parametrize("output", [None, "gs://bucket/exports", "s3://bucket/exports"])
def test_exports(buckets, whole, story, exported, output):
    flags, out = (), exported
    if output is not None:
        flags = (f"--output={output}/{story.kind}",)
        status, out, err = buckets.run("--mode=export", f"--workdir={story.run}", *flags)
        assert status == 0, err
    output = f"{output}/{story.kind}" if output else f"{story.run}/export"
    assert out.startswith(f"Written to {output}: orbax, float32")
    if flags and output.startswith(story.kind):  # and again: there is one already
        status, _, err = buckets.run("--mode=export", f"--workdir={story.run}", *flags)
        assert status == 2 and "a folder that does not exist yet" in err
    of_export = buckets.run("--mode=sample", f"--workdir={output}", "--prompt=attention")
    here = buckets.run("--mode=sample", f"--workdir={whole}", "--prompt=attention")
    assert of_export[0] == 0, of_export[2]
    assert of_export[1] == here[1]


@pytest.mark.usefixtures("exported")
def test_weights_to_start_from(buckets, story, tmp_path):
    for source in (story.run, f"{story.run}/checkpoints/20", f"{story.run}/export"):
        process = buckets.train(tmp_path / "new", f"--init_from={source}", "--mode=check")
        status, out, err = finish(process)
        assert status == 0, err
        assert "starting from the weights of " in out


def _start_two(buckets, workdir, **settings):
    """Returns the two processes of one run."""
    flags = (f"--coordinator=127.0.0.1:{_free_port()}", "--process_count=2")
    return [
        buckets.train(workdir, *flags, f"--process_id={number}", **settings) for number in range(2)
    ]


@pytest.fixture(scope="module")
def whole_of_two(buckets):
    for process in _start_two(buckets, buckets.folder / "whole_of_two"):
        assert finish(process)[0] == 0
    return buckets.folder / "whole_of_two"


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_one_killed_in_a_save_resume_bit_exactly(buckets, whole_of_two, kind):
    run = f"{kind}://bucket/runs/two"
    first, second = _start_two(buckets, run)
    with buckets.told(kind, "kill", f"{first.pid} checkpoints/12/commit_success.txt"):
        assert finish(first)[0] == -9
        second.kill()  # as a scheduler does
        second.communicate()
    (status, out, err), (other, silent, _) = map(finish, _start_two(buckets, run))
    assert (status, other) == (0, 0), err
    assert "resuming after step 8\n" in out and "step" not in silent
    lines = buckets.read(f"{run}/metrics.jsonl")
    assert _records(lines) == _records((whole_of_two / "metrics.jsonl").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_two_processes_can_not_write_a_checkpoint(buckets, whole_of_two, kind):
    run = f"{kind}://bucket/runs/full"
    program = ("-m", "tests.training.faulty_program")
    processes = _start_two(buckets, run, program=program, FAULT="full,12,1")
    (status, _, err), (other, _, silent) = map(finish, processes)
    assert (status, other) == (0, 0), err
    why = (
        "could not be written (process 1: No space left on device); the last good one is of step 8"
    )
    assert err.count(why) == 1 and why not in silent
    steps = {name.split("/")[4] for name in buckets.objects(run) if "/checkpoints/" in name}
    assert {"20", "24"} <= steps and "12" not in steps
    lines = buckets.read(f"{run}/metrics.jsonl")
    assert _records(lines) == _records((whole_of_two / "metrics.jsonl").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_sigterm_to_one_of_two_processes_saves_and_one_goes_on(buckets, whole_of_two, kind):
    run = f"{kind}://bucket/runs/preempted"
    processes = _start_two(buckets, run)
    assert any(line.startswith("first step") for line in iter(processes[0].stdout.readline, ""))
    processes[1].send_signal(signal.SIGTERM)
    (status, out, err), (other, _, _) = map(finish, processes)
    assert (status, other) == (143, 143), err
    assert "SIGTERM: stopped after step " in out
    assert f"{run}/{LOCK}".partition("://")[2] not in buckets.objects(run)
    last = out.partition("stopped after step ")[2].partition(",")[0]
    status, out, err = finish(buckets.train(run))
    assert status == 0 and f"resuming after step {last}\n" in out, err
    found, wanted = (
        {record["step"]: record["loss"] for record in _records(text)}
        for text in (
            buckets.read(f"{run}/metrics.jsonl"),
            (whole_of_two / "metrics.jsonl").read_text(),
        )
    )
    assert found.keys() == wanted.keys()
    assert max(abs(found[step] / wanted[step] - 1) for step in wanted) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_training_is_refused_while_the_first_is_at_work(buckets, kind):
    run = f"{kind}://bucket/runs/twice"
    first = buckets.train(run, "--config.training.steps=2000", "--config.training.keep=1")
    lock = f"bucket/runs/twice/{LOCK}"
    deadline = time.monotonic() + 200
    while lock not in buckets.objects(run) and time.monotonic() < deadline:
        time.sleep(1)
    status, _, err = finish(buckets.train(run))
    assert status == 2 and f"(process {first.pid} on " in err, err
    first.send_signal(signal.SIGTERM)
    assert finish(first)[0] == 143
    assert lock not in buckets.objects(run)


@pytest.fixture(scope="module")
def corpus(buckets):
    """The text as one file of lines of JSON."""
    path = buckets.folder / "corpus" / "text.jsonl"
    path.parent.mkdir()
    texts = [file.read_text() for file in sorted((buckets.folder / "text").rglob("*.txt"))]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _prepare(buckets, source, output, **environment):
    flags = ("--tokenizer=train", "--vocab_size=270", "--validation_fraction=0.2", "--id_field=")
    flags = (f"--input={source}", f"--output={output}", "--num_workers=1", *flags)
    program = ("-m", "lazyattn.data.prepare")
    return buckets.run(*flags, program=program, **environment)


@pytest.fixture(scope="module")
def of_shards(buckets, corpus):
    """What a run on prepared data of this machine does, and what is measured of it."""
    shards = buckets.folder / "shards"
    status, _, err = _prepare(buckets, corpus, shards)
    assert status == 0, err
    return shards, *_train_on(buckets, shards, buckets.folder / "on_shards", corpus)


def _train_on(buckets, shards, workdir, text, *flags):
    """Returns the log of a run on prepared data, and what is measured on it and on a text."""
    process = buckets.train(workdir, f"--config.data.path={shards}", *flags)
    status, _, err = finish(process)
    assert status == 0, err
    measured = [f"--text={shards}", f"--text={text}", f"--lambada={text}", "--limit=2"]
    status, out, err = buckets.run("--mode=eval", f"--workdir={workdir}", *measured)
    assert status == 0, err
    tables = [line for line in out.splitlines() if "|" in line]
    return _records(buckets.read(f"{workdir}/metrics.jsonl")), tables


@pytest.mark.parametrize("kind", KINDS)
def test_data_and_programs_in_a_bucket(buckets, of_shards, corpus, kind):
    """All that is read and written is in the bucket, and requests fail."""
    shards, log, measured = of_shards
    at = f"{kind}://bucket/{{}}".format
    buckets.python(
        f"epath.Path({at('corpus/text.jsonl')!r}).write_bytes(Path({str(corpus)!r}).read_bytes())"
    )
    with buckets.told(kind, "fail", FAILS.replace("9", "31", 1)):
        status, out, err = _prepare(buckets, at("corpus/*.jsonl"), at("shards"))
        assert status == 0, err
        assert f"--config.data.path={at('shards')}" in out
        cache = f"--compile_cache_dir={at('compiled')}"
        text = at("corpus/text.jsonl")
        found = _train_on(buckets, at("shards"), at("runs/data"), text, cache, "--profile=2:3")
    assert found == (log, measured)
    names = {name.partition("/")[2].partition("/")[0] for name in buckets.objects(at(""))}
    assert {"shards", "compiled", "runs", "corpus"} <= names
    assert any("xplane.pb" in name for name in buckets.objects(at("runs/data/profile")))
    same = f"from lazyattn.data.manifest import read; print(read({at('shards')!r}).splits == "
    assert "True" in buckets.python(f"{same} read({str(shards)!r}).splits)")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_refused_costs_no_other(buckets, whole, kind):
    run = f"{kind}://bucket/runs/refused"
    with buckets.told(kind, "deny", "refused/checkpoints/12/"):
        status, _, err = finish(buckets.train(run))
    assert status == 0, err
    assert "the checkpoint of step 12 could not be written (" in err
    assert "the last good one is of step 8" in err
    names = {name.partition("/checkpoints/")[2] for name in buckets.objects(run)}
    assert {"20/commit_success.txt", "24/commit_success.txt"} <= names
    assert not any(name.startswith("12/") for name in names)
    lines = buckets.read(f"{run}/metrics.jsonl")
    assert _records(lines) == _records((whole / "metrics.jsonl").read_text())


def test_a_dry_run_leaves_nothing(buckets, story):
    runs = f"{story.kind}://bucket/runs"
    before = buckets.objects(runs)
    for workdir in (story.run, f"{runs}/new"):
        process = buckets.train(workdir, "--mode=check", "--config.training.steps=30")
        status, out, err = finish(process)
        assert status == 0, err
        assert "nothing of this is kept" in out
    assert buckets.objects(runs) == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_not_be_read_is_one_sentence(buckets, whole, kind, tmp_path):
    url = f"{kind}://bucket/secret"
    at = f"--workdir={whole}"
    commands = [
        (f"--workdir={url}", "--mode=sample"),
        (at, "--mode=eval", f"--text={url}"),
        (at, "--mode=eval", f"--lambada={url}/x.jsonl"),
    ]
    with buckets.told(kind, "refuse", "403"):
        found = [buckets.run(*command) for command in commands]
        for setting in ("--config.data.path", "--config.data.source", "--init_from"):
            found.append(finish(buckets.train(tmp_path / "new", f"{setting}={url}")))
    for status, _, err in found:
        assert status == 2 and err.count("\n") == 1, err
        assert f"is '{url}" in err and "but can't be read (it is forbidden" in err
    assert not (tmp_path / "new").exists()


NO_KEYS = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "1"}


@pytest.mark.parametrize(
    ("bucket", "refuse", "environment", "why"),
    [
        ("gs://missing", None, {}, "there is no such bucket"),
        ("gs://bucket", "401", {}, "there are no credentials for it"),
        ("gs://bucket", "403", {}, "it is forbidden"),
        ("s3://missing", None, {}, "there is no such bucket"),
        ("s3://bucket", None, NO_KEYS, "there are no credentials for it"),
        ("s3://bucket", "403", {}, "it is forbidden"),
    ],
)
def test_a_bucket_that_can_not_be_used_is_one_sentence(buckets, bucket, refuse, environment, why):
    with contextlib.ExitStack() as stack:
        if refuse:
            stack.enter_context(buckets.told(bucket[:2], "refuse", refuse))
        status, out, err = finish(buckets.train(f"{bucket}/refused", **environment))
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    start = f"--workdir is '{bucket}/refused', but nothing can be written there ({why}"
    assert line.startswith(start)


def test_a_damaged_checkpoint_is_moved_aside(buckets, story):
    run = f"{story.kind}://bucket/runs/torn"
    files = f"fsspec.core.url_to_fs({run!r})[0]"
    torn = f"{run}/checkpoints/24/state/manifest.ocdbt"
    buckets.python(
        "import fsspec",
        f"for name in {sorted(story.left)!r}:",
        f"    {files}.cp_file(name, name.replace('/runs/one/', '/runs/torn/'))",
        f"epath.Path({torn!r}).write_bytes(b'')",
    )
    status, out, err = finish(buckets.train(run))
    assert status == 0, err
    assert "resuming after step 20\n" in out
    assert "bucket/runs/torn/damaged/24-1/commit_success.txt" in buckets.objects(run)
    lines = buckets.read(f"{run}/metrics.jsonl")
    assert [record["step"] for record in _records(lines)] == list(range(1, STEPS + 1))
