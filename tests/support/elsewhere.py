"""Tests that run somewhere else at the same time, and are reported as if they had run here.

    this pytest                                               another process (Beside), or pytest in a machine (netns-lab/vm)
     starts them ------------------ names of tests -------->    run them, on the same tree, at a lower priority
     everything else, as always                                 one after the other
     the others', last        <---- reports, as JSON --------
     counts, prints, fails                                    (a file descriptor; what they print goes to our error, if they break)

To the machine go the tests of IPVS where the host has none: those with the mark ``ipvs``, and those of tests/kernel/test_ipvs*.py.
They are skipped only where no machine can be had at all; a machine that does not work is a failure. To the other process go the tests
that touch no kernel (unit, property, golden), when tests of the kernel run as well: these wait most of the time, those compute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pytest

from kernelstate.linux.ipvs import has_ipvs
from netnslab import vm, vm_kernel, vm_qemu
from netnslab.errors import LabError

REPORTS = "NODEPLANE_TEST_REPORTS"  # set in the other process: where reports go
NAMES = "NODEPLANE_TEST_NAMES"  # as well: a file with the names of its tests, as JSON. As words they could be too long, or not be found
SECONDS = 1200
NICENESS = {"beside": 3, "machine": 5}
"""Tests that run here at the same time measure how long things take; those in the machine have an emulated CPU anyway."""
BYTECODE = vm_kernel.CACHE / "bytecode"
COMPUTING = {"unit", "property", "golden"}
WORTH_IT = 100
"""Tests: for fewer, no process is started beside."""


class Reporting:
    """In the other process: keeps the tests it is to run of those in its files, and writes each report as a line of JSON."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._config = config
        self._file = Path(path).open("a", buffering=1)  # noqa: SIM115  open as long as pytest runs
        self._names = set(json.loads(Path(os.environ[NAMES]).read_text()))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self._names]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._file.write(json.dumps(data, default=str) + "\n")


class Elsewhere:
    """Here: takes those tests out of the usual order, and reports what became of them."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._groups: list[_Group] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        machine = [] if has_ipvs() else [item for item in items if belongs(item)]
        beside = [] if self._config.option.usepdb else [item for item in items if item.path.parent.name in COMPUTING]
        if len(beside) < WORTH_IT or all(item.path.parent.name in COMPUTING for item in items):
            beside = []
        self._groups = [
            _Group(self._config, kind, chosen) for kind, chosen in ((_Beside, beside), (_Machine, machine)) if chosen
        ]
        taken = {*beside, *machine}
        # Last, because pytest takes down the fixtures of one test with the next one in view, and these have none here.
        items[:] = [*(item for item in items if item not in taken), *beside, *machine]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        if not session.config.option.collectonly and not session.testsfailed:
            for group in self._groups:
                group.start()

    def pytest_sessionfinish(self) -> None:
        for group in self._groups:
            group.close()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        return True if any(group.report(item) for group in self._groups) else None


class _Group:
    """Some tests, and the process in which they run."""

    def __init__(self, config: pytest.Config, kind: type[_Process], items: list[pytest.Item]) -> None:
        self._config, self._kind, self._items = config, kind, dict.fromkeys(items)
        self._reports: dict[str, list[pytest.TestReport]] | None = None
        self._process: _Process | None = None

    def start(self) -> None:
        self._process = self._kind(list(self._items), self._config.rootpath)

    def close(self) -> None:
        if self._process is not None:
            self._process.close()

    def report(self, item: pytest.Item) -> bool:
        """Tell pytest what became of a test; whether it is one of these."""
        if item not in self._items:
            return False
        if self._reports is None:
            self._reports = self._run()
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports[item.nodeid]:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _run(self) -> dict[str, list[pytest.TestReport]]:
        """Wait for the process; every test has at least one report, whatever happened."""
        assert self._process is not None
        if self._process.unavailable:
            return {item.nodeid: [_skipped(item, self._process.unavailable)] for item in self._items}
        heard, said = self._process.wait()
        reports: dict[str, list[pytest.TestReport]] = {item.nodeid: [] for item in self._items}
        for line in heard.rpartition("\n")[0].splitlines():
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=json.loads(line))
            reports[report.nodeid].append(report)
        for item in self._items:
            if all(report.when != "teardown" for report in reports[item.nodeid]):
                text = f"did not come to an end {self._process.place}\n{said[-4000:]}"
                reports[item.nodeid].append(_failed(item, text))
        return reports


class _Process:
    """Pytest with the tests in it, started at once; a process which ends with this one however that ends."""

    place = ""

    def __init__(self, items: Sequence[pytest.Item], folder: Path) -> None:
        self.unavailable = ""
        self._names = tempfile.NamedTemporaryFile("w", suffix=".json")  # noqa: SIM115
        json.dump([item.nodeid for item in items], self._names)
        self._names.flush()
        files = dict.fromkeys(str(item.path.relative_to(folder)) for item in items)
        self._process: subprocess.Popen[bytes] | None = None
        self._heard: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  open until close
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.begin([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], folder)

    def begin(self, words: list[str], folder: Path) -> None:
        """Start it, or say in ``unavailable`` why it can't be."""
        raise NotImplementedError

    def run(self, words: Sequence[str], environment: dict[str, str], folder: Path, niceness: int) -> None:
        """Start ``words``, which has its reports go to its standard output."""
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "nice", "-n", str(niceness), *words],
            cwd=folder,
            env={**os.environ, NAMES: self._names.name, **environment},
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
        for file in (self._heard, self._said, self._names):
            file.close()


REPORTS_TO_OUTPUT = ("bash", "-c", 'exec 9>&1 >&2; exec "$@"', "bash")
"""Standard output becomes descriptor 9, and what is printed goes where errors go."""


class _Beside(_Process):
    """A process on this host."""

    place = "in the process beside"

    def begin(self, words: list[str], folder: Path) -> None:
        self.run([*REPORTS_TO_OUTPUT, *words], {REPORTS: "/dev/fd/9"}, folder, NICENESS["beside"])


class _Machine(_Process):
    """A virtual machine."""

    place = "in the virtual machine"

    def begin(self, words: list[str], folder: Path) -> None:
        try:
            vm_qemu.check_host()
            vm_kernel.fetch()
        except vm_kernel.UnavailableError as error:
            self.unavailable = f"no IPVS in this kernel, and no virtual machine: {error}"
            return
        except LabError:
            pass  # the machine says it, and the tests fail with it
        bytecode = {"PYTHONPYCACHEPREFIX": str(BYTECODE)}
        collecting = {**os.environ, **bytecode, REPORTS: os.devnull, NAMES: self._names.name}
        _compile_here([*words, "--collect-only"], collecting, folder)
        machine = [sys.executable, "-m", "netnslab.vm", "--timeout", str(SECONDS), "--"]
        environment = {**bytecode, REPORTS: "/dev/fd/9"}
        self.run([*machine, *REPORTS_TO_OUTPUT, *words], environment, folder, NICENESS["machine"])


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
