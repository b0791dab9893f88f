"""Tests of IPVS on a host whose kernel has none: they run in a virtual machine, and are reported as if they had run here.

    this pytest                                              pytest in the machine (netns-lab/vm)
     everything else, as always
     the tests of IPVS, last and at once -- their names -->   runs them, on the same tree
     counts, prints, fails            <-- reports, as JSON --
                                                             (file descriptor 9; what it prints goes to our error, if it breaks)

A test belongs to them by the mark ``ipvs``, or by its file's name, tests/kernel/test_ipvs*.py. Where the host has IPVS nothing of
this happens. They are skipped only where no machine can be had at all; a machine that does not work is a failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernelstate.linux.ipvs import has_ipvs
from netnslab import vm, vm_kernel
from netnslab.errors import LabError

REPORTS = "NODEPLANE_TEST_REPORTS"  # set in the machine: where reports go
SECONDS = 900.0
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

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if belongs(item)]
        if not chosen or has_ipvs():
            return
        # Last, because pytest takes down the fixtures of one test with the next one in view, and these have none here.
        self._items = chosen
        items[:] = [*(item for item in items if item not in set(chosen)), *chosen]

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
        """Run all of them, in one machine; every test has at least one report, whatever happens."""
        pytest_there = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(i.nodeid for i in self._items)]
        command = ["bash", "-c", 'exec 9>&1 >&2; exec "$@"', "bash", *pytest_there]
        environment = {**os.environ, REPORTS: "/dev/fd/9", "PYTHONPYCACHEPREFIX": str(BYTECODE)}
        heard: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        reason = ""
        _compile_here([*pytest_there, "--collect-only"], {**environment, REPORTS: os.devnull}, self._config.rootpath)
        try:
            vm.run(
                command,
                folder=self._config.rootpath,
                environment=environment,
                timeout=SECONDS,
                listener=lambda stream, data: heard[stream].extend(data),
            )
        except vm_kernel.UnavailableError as error:
            return {
                item.nodeid: [_skipped(item, f"no IPVS in this kernel, and no virtual machine: {error}")]
                for item in self._items
            }
        except LabError as error:
            reason = str(error)
        reports: dict[str, list[pytest.TestReport]] = {item.nodeid: [] for item in self._items}
        whole_lines = heard["stdout"].decode().rpartition("\n")[0]
        for line in whole_lines.splitlines():
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=json.loads(line))
            reports[report.nodeid].append(report)
        said = heard["stderr"].decode(errors="replace")[-4000:]
        for item in self._items:
            if all(report.when != "teardown" for report in reports[item.nodeid]):
                text = f"did not come to an end in the virtual machine\n{reason}\n{said}"
                reports[item.nodeid].append(_failed(item, text))
        return reports


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
