"""Preparations that are ended by kill -9 lose and double nothing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lazyattn.data import manifest
from lazyattn.data.prepare.run import Preparation, prepare_shards
from lazyattn.data.prepare.selection import Selection
from lazyattn.data.shards import Shards
from lazyattn.data.tokenizer import Tokenizer
from tests.data.prepare.corpora import make_documents, write_jsonl, write_parquet
from tests.data.prepare.kill_program import STAGES

ROOT = Path(__file__).parents[3]


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    write_parquet(folder / "in" / "a.parquet", make_documents(60, 1))
    write_jsonl(folder / "in" / "b.jsonl", make_documents(40, 2))
    command = [sys.executable, "-m", "tests.data.prepare.kill_program", folder / "in", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_stage_and_gone_on_with(folders, stage):
    assert _files(folders / stage) == _files(folders / "whole")
    manifest.verify(folders / stage, deep=True)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.fixture
def heeds_interrupts():
    """A shell that starts tests in the background makes all of them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds child processes in /proc")
def test_the_command_is_ended_and_goes_on(tmp_path, heeds_interrupts):
    """As a user does it: Ctrl-C, then kill -9 of the parent alone, then no more."""
    documents = make_documents(1000, words=1300)
    pieces = -(-write_jsonl(tmp_path / "in" / "a.jsonl", documents).stat().st_size // 10**6)
    Tokenizer.train([documents[0]["text"]], 300).save(tmp_path / "tokenizer.json")
    command = [
        sys.executable,
        "-m",
        "lazyattn.data.prepare",
        f"--input={tmp_path}/in",
        f"--output={tmp_path}/out",
        f"--tokenizer={tmp_path}/tokenizer.json",
        "--validation_fraction=0.1",
        "--shard_mb=1",
        "--num_workers=2",
    ]
    work = tmp_path / "out" / ".preparation"
    ends = {}
    for end in (signal.SIGINT, signal.SIGKILL):
        before = len(list(work.glob("unit-*.json")))
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
            until = time.monotonic() + 300
            while len(list(work.glob("unit-*.json"))) <= before and time.monotonic() < until:
                time.sleep(0.005)
            children = _children(process.pid)
            process.send_signal(end)
        ends[end] = process.returncode
        assert len(children) >= 2
        assert before < len(list(work.glob("unit-*.json"))) < pieces
        assert not (tmp_path / "out" / "manifest.json").exists()
        until = time.monotonic() + 60
        while any(map(_alive, children)) and time.monotonic() < until:
            time.sleep(0.01)
        assert not any(map(_alive, children)), "worker processes outlive their parent"
    assert ends == {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "goes on: " in again.stderr
    whole = prepare_shards(
        Preparation(
            inputs=(f"{tmp_path}/in",),
            output=f"{tmp_path}/whole",
            tokenizer=f"{tmp_path}/tokenizer.json",
            selection=Selection(validation_fraction=0.1),
            shard_mb=1,
            num_workers=1,
        )
    )
    assert _files(tmp_path / "out") == _files(whole.folder)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    texts = [
        tokenizer.decode(ids)
        for split in manifest.SPLITS
        for ids in Shards(tmp_path / "out", split)
    ]
    assert sorted(texts) == sorted(document["text"] for document in documents)
    assert not work.exists()
