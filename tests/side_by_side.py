"""Tests in two processes: pytest takes them from the first on, a fork of it from the last on; they meet.

A test keeps one core busy, so that on two cores all of them take little more than half as long. What the fork
finds is shown after the rest, as if it had been run here, but for warnings of other packages. Nothing is
forked for the tests of one file, on one core, beside a GPU, and where somebody looks on (-x, -s, --pdb):
pytest then runs one test after the other, as ever.
"""
import contextlib
import itertools
import os
import pickle
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch

from commands import exit_code


def run_tests(session):
    """Runs all tests of a session -> True; None if pytest is to do so itself."""
    option, files = session.config.option, {item.path for item in session.items}
    watched = option.collectonly or option.maxfail or option.usepdb or option.capture == "no"
    if watched or session.testsfailed or len(files) < 2 or not can_fork():
        return None
    numbered = list(enumerate(session.items))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        child = os.fork()
        if not child:
            run_in_fork(session, numbered[::-1], folder)
        try:
            run_unclaimed(session, numbered, folder)
            code = exit_code(child)
        except BaseException:
            os.kill(child, signal.SIGINT)
            exit_code(child)
            raise
        show(session, read_reports(folder / "reports"))
        if code:
            error = folder / "error"
            reason = error.read_text() if error.exists() else ""
            pytest.exit(f"the fork that ran half of the tests ended with {code} {reason}", returncode=1)
    return True


def can_fork() -> bool:
    """Whether a fork has a core of its own, and all that tests ask for: CUDA, once asked for, refuses it."""
    if sys.platform != "linux" or torch.cuda.is_available() or "PYTEST_XDIST_WORKER" in os.environ:
        return False
    return len(os.sched_getaffinity(0)) > 1


def unclaimed(numbered, folder: Path):
    """Of (number, test) those that the other process has not begun: whoever makes the file n runs test n."""
    for number, item in numbered:
        try:
            (folder / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        yield item


def run_unclaimed(session, numbered, folder: Path):
    items = itertools.chain(unclaimed(numbered, folder), [None])
    for item, following in itertools.pairwise(items):
        item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)


def run_in_fork(session, numbered, folder: Path):
    """Runs tests and writes what pytest reports of them into a file. Does not return."""
    # two processes of training have been begun by the other, or will be: it alone can wait for them
    numbered = [(number, item) for number, item in numbered if "two_processes" not in item.fixturenames]
    session.items = [item for _, item in numbered]
    plugins = session.config.pluginmanager
    code = 1
    try:
        plugins.unregister(name="terminalreporter")
        capture = plugins.getplugin("capturemanager")   # what is printed shares no file with the other's
        capture.stop_global_capturing()
        capture.start_global_capturing()
        with open(folder / "reports", "wb", buffering=0) as file:
            plugins.register(ReportWriter(file))
            run_unclaimed(session, numbered, folder)
        code = 0
    except Exception:
        (folder / "error").write_text(traceback.format_exc())
    finally:
        os._exit(code)


class ReportWriter:
    """A plugin for pytest that writes its reports into a file."""

    def __init__(self, file):
        self.file = file

    def pytest_runtest_logreport(self, report):
        pickle.dump(report, self.file)


def read_reports(path: Path) -> dict[str, list]:
    """Each test with its reports: of setup, call and teardown."""
    reports = {}
    with open(path, "rb") as file, contextlib.suppress(EOFError, pickle.UnpicklingError):   # cut by a crash
        while True:
            report = pickle.load(file)
            reports.setdefault(report.nodeid, []).append(report)
    return reports


def show(session, reports: dict[str, list]):
    """What the fork has found, in the order of the tests."""
    for item in session.items:
        for report in reports.get(item.nodeid, []):
            if report.when == "setup":
                item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            item.ihook.pytest_runtest_logreport(report=report)
