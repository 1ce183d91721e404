"""A plugin, `pytest -p tests.cpu_seconds`: how much computing the tests of each folder took.

CPU seconds, those of processes that tests start and wait for included: unlike wall time they
hardly depend on what else a machine does. CONTRIBUTING.md says how many there may be.
`CPU_SECONDS_SLOWEST` is how many of the slowest tests are listed, 10 by default.
"""

import collections
import os
import time
from pathlib import PurePosixPath

import pytest

SLOWEST = int(os.environ.get("CPU_SECONDS_SLOWEST", "10"))
_NAME = "cpu_seconds"


def _used() -> float:
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    item.stash[_START] = _used()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    # Workers of pytest-xdist send reports, and what stands in them. Each phase of a test,
    # set-up and tear-down too, tells what it took since the one before.
    report = yield
    now = _used()
    report.user_properties.append((_NAME, now - item.stash[_START]))
    item.stash[_START] = now
    return report


_START = pytest.StashKey[float]()


def pytest_terminal_summary(terminalreporter):
    tests, folders = collections.Counter(), collections.Counter()
    seconds = collections.defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == _NAME:
                    tests[report.nodeid] += value
    for nodeid, value in tests.items():
        folder = PurePosixPath(nodeid.split("::")[0]).parent
        top = str(PurePosixPath(*folder.parts[:2]))
        folders[top] += 1
        seconds[top] += value
    terminalreporter.section("CPU seconds")
    for folder in sorted(seconds, key=seconds.get, reverse=True):
        terminalreporter.line(f"{seconds[folder]:8.1f} {folders[folder]:5d} tests  {folder}")
    terminalreporter.line(f"{sum(tests.values()):8.1f} {len(tests):5d} tests")
    for nodeid, value in tests.most_common(SLOWEST):
        terminalreporter.line(f"{value:8.1f} {nodeid}")
