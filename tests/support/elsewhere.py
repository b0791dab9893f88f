"""Tests of IPVS on a host whose kernel has none: they run in a virtual machine, and are reported as if they had run here.

    this pytest                                              pytest in the machine (netns-lab/vm)
     starts the machine ------ names of the tests of IPVS -->   runs them, on the same tree, in a process of its own
     everything else, as always                              one after the other, at a lower priority
     the tests of IPVS, last     <-- reports, as JSON --------
     counts, prints, fails                                   (file descriptor 9; what it prints goes to our error, if it breaks)

A test belongs to them by the mark ``ipvs``, or by its file's name, tests/kernel/test_ipvs*.py. Where the host has IPVS nothing of
this happens. They are skipped only where no machine can be had at all; a machine that does not work is a failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest

from kernelstate.linux.ipvs import has_ipvs
from netnslab import vm, vm_kernel, vm_qemu
from netnslab.errors import LabError

REPORTS = "NODEPLANE_TEST_REPORTS"  # set in the machine: where reports go
SECONDS = 900
NICENESS = 5
"""Tests that run here at the same time measure how long things take; those in the machine have an emulated CPU anyway."""
BYTECODE = vm_kernel.CACHE / "bytecode"


class Reporting:
    """In the machine: writes each report as a line of JSON."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._config = config
        self._file = Path(path).open("a", buffering=1)  # noqa: SIM115  open as long as pytest runs

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._file.write(json.dumps(data, default=str) + "\n")


class Elsewhere:
    """On the host: takes the tests of IPVS out of the usual order, and reports what became of them in the machine."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._items: list[pytest.Item] = []
        self._reports: dict[str, list[pytest.TestReport]] | None = None
        self._machine: _Machine | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if belongs(item)]
        if not chosen or has_ipvs():
            return
        # Last, because pytest takes down the fixtures of one test with the next one in view, and these have none here.
        self._items = chosen
        items[:] = [*(item for item in items if item not in set(chosen)), *chosen]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        if self._items and not session.config.option.collectonly and not session.testsfailed:
            self._machine = _Machine(self._items, self._config.rootpath)

    def pytest_sessionfinish(self) -> None:
        if self._machine is not None:
            self._machine.close()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if item not in self._items:
            return None
        if self._reports is None:
            self._reports = self._run()
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports[item.nodeid]:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _run(self) -> dict[str, list[pytest.TestReport]]:
        """Wait for the machine; every test has at least one report, whatever happened."""
        assert self._machine is not None
        if self._machine.unavailable:
            reason = f"no IPVS in this kernel, and no virtual machine: {self._machine.unavailable}"
            return {item.nodeid: [_skipped(item, reason)] for item in self._items}
        heard, said = self._machine.wait()
        reports: dict[str, list[pytest.TestReport]] = {item.nodeid: [] for item in self._items}
        for line in heard.rpartition("\n")[0].splitlines():
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=json.loads(line))
            reports[report.nodeid].append(report)
        for item in self._items:
            if all(report.when != "teardown" for report in reports[item.nodeid]):
                text = f"did not come to an end in the virtual machine\n{said[-4000:]}"
                reports[item.nodeid].append(_failed(item, text))
        return reports


class _Machine:
    """The machine with the tests in it, started at once; a process of its own, which ends with this one however that ends."""

    def __init__(self, items: list[pytest.Item], folder: Path) -> None:
        self.unavailable = ""
        self._process: subprocess.Popen[bytes] | None = None
        try:
            vm_qemu.check_host()
            vm_kernel.fetch()
        except vm_kernel.UnavailableError as error:
            self.unavailable = str(error)
            return
        except LabError:
            pass  # the machine says it, and the tests fail with it
        pytest_there = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(i.nodeid for i in items)]
        environment = {**os.environ, REPORTS: "/dev/fd/9", "PYTHONPYCACHEPREFIX": str(BYTECODE)}
        _compile_here([*pytest_there, "--collect-only"], {**environment, REPORTS: os.devnull}, folder)
        self._heard: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  open until close
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        machine = [sys.executable, "-m", "netnslab.vm", "--timeout", str(SECONDS), "--"]
        self._process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "nice", "-n", str(NICENESS)),
                *(*machine, "bash", "-c", 'exec 9>&1 >&2; exec "$@"', "bash", *pytest_there),
            ],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._heard,
            stderr=self._said,
        )

    def wait(self) -> tuple[str, str]:
        """Wait until all tests in it have run; return what it reported, and what it said."""
        assert self._process is not None
        self._process.wait(timeout=SECONDS + vm.BOOT_SECONDS)
        texts = []
        for file in (self._heard, self._said):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return texts[0], texts[1]

    def close(self) -> None:
        """End it if it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._heard.close()
            self._said.close()


def configure(config: pytest.Config) -> None:
    """Take part in this run of pytest, on the side where it is."""
    config.addinivalue_line("markers", "ipvs: needs IPVS; runs in a virtual machine where the kernel has none")
    path = os.environ.get(REPORTS)
    config.pluginmanager.register(Reporting(config, path) if path else Elsewhere(config))


def belongs(item: pytest.Item) -> bool:
    """Whether a test needs IPVS."""
    by_name = item.path.parent.name == "kernel" and item.path.name.startswith("test_ipvs")
    return by_name or item.get_closest_marker("ipvs") is not None


def _compile_here(collect: list[str], environment: dict[str, str], folder: Path) -> None:
    """Leave the bytecode of what these tests import where the machine will look for it: here that takes two seconds, there thirty."""
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run(collect, cwd=folder, env=environment, check=False, timeout=120, capture_output=True)


def _skipped(item: pytest.Item, reason: str) -> pytest.TestReport:
    place = (str(item.path), (item.location[1] or 0) + 1, f"Skipped: {reason}")
    return pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "skipped", place, "setup")


def _failed(item: pytest.Item, text: str) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", text, "call")
