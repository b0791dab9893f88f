"""``drift-repair``: somebody else's flush under a running agent; how long until all is back, and how much is written for it.

    nat flushed          iptables -t nat -F               every Service's rules are gone: all of nat has to be written
    one chain flushed    iptables -t nat -F KUBE-SVC-..   one Service's: the repair should be as small

    namespace of its own                                        seen from outside
      nodeplane agent --> PATH --> iptables-legacy-restore       a script that copies what it is fed: bytes rewritten
            |                              |                     getsockopt: number of entries of the nat table,
      the agent's own /run          the kernel's nat table       asked until it is what it was

Each flush comes right after the agent was busy, which is the worst moment: it looks for foreign changes once a second, counted from
its last round. Repairing means noticing, reading everything back, and writing what is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import cluster
from bench.fresh import memory
from bench.kernel import may_use_kernel, own_namespace
from bench.result import Options, Row, against, median
from kernelstate.linux import netns
from kernelstate.linux.iptables import entries
from netnslab import mounts
from nodeplane.commands import Failed
from nodeplane.status import read_status

SERVICES = 1_000
REPEATS = 5
LONGEST = 60.0
"""Seconds until something that should happen is given up."""
RESTORE = "iptables-legacy-restore"


def measure(options: Options, repeats: int = REPEATS) -> list[Row]:
    """Measure at one size. Raises Failed."""
    if not may_use_kernel():
        raise Failed("drift-repair: an agent in a namespace of its own needs root")
    services = options.services or SERVICES

    def row(name: str, metric: str, value: float, unit: str) -> Row:
        return Row(name, options.mode, {"services": services}, metric, value, unit)

    with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory, own_namespace() as namespace:
        root = Path(directory)
        cluster.write_directory(root / "objects", services)
        with _running_agent(namespace, root) as agent:
            agent.wait(agent.is_synced, "the first sync")
            first = row("first sync", "text size", agent.fed(), "bytes")
            rows = [first, row("first sync", "agent's peak RSS", agent.peak_rss(), "MB")]
            for name, chain in (("nat flushed", []), ("one chain flushed", [_some_chain(namespace)])):
                times, written = zip(*[_repair(namespace, agent, chain) for _ in range(repeats)], strict=True)
                rows += [
                    row(name, "until back median", median(times), "ms"),
                    row(name, "until back longest", max(times), "ms"),
                    against(row(name, "text size", median(written), "bytes"), first.value, "first sync's text"),
                ]
            rows.append(row("after all repairs", "agent's peak RSS", agent.peak_rss(), "MB"))
    return rows


def _some_chain(namespace: str) -> str:
    """Return one Service's chain."""
    listing = netns.run(namespace, ["iptables-legacy-save", "-t", "nat"], timeout=LONGEST)
    return min(line.split()[0][1:] for line in listing.splitlines() if line.startswith(":KUBE-SVC-"))


def _repair(namespace: str, agent: RunningAgent, chain: list[str]) -> tuple[float, int]:
    """Flush once; return milliseconds until the nat table's entries are back, and the bytes fed to restore for it."""
    with netns.inside(namespace):
        whole, fed, last = entries(4, "nat"), agent.fed(), agent.last_sync()
        subprocess.run(["iptables-legacy", "-w", "5", "-t", "nat", "-F", *chain], check=True, timeout=LONGEST)
        started = time.perf_counter()
        agent.wait(lambda: entries(4, "nat") == whole, "the nat table's entries")
        took = 1000 * (time.perf_counter() - started)
    agent.wait(lambda: agent.last_sync() > last and agent.is_synced(), "the agent's word that it is in sync")
    return took, agent.fed() - fed


class RunningAgent:
    """An agent's process, and what can be seen of it from outside."""

    def __init__(self, process: subprocess.Popen[bytes], root: Path) -> None:
        self._process = process
        self._root = root

    def fed(self) -> int:
        """Return how many bytes its iptables-legacy-restore has been fed so far."""
        try:
            return (self._root / "fed").stat().st_size
        except FileNotFoundError:
            return 0

    def is_synced(self) -> bool:
        """Whether its status says so."""
        status = read_status(self._root / "run/status.json")
        return status is not None and status.synced

    def last_sync(self) -> float:
        """Return when its status says it was last in sync, in seconds since the epoch."""
        status = read_status(self._root / "run/status.json")
        return status.last_sync if status else 0.0

    def peak_rss(self) -> float:
        """Return its largest resident size so far in MB."""
        return memory("VmHWM", Path(f"/proc/{self._process.pid}/status"))

    def wait(self, is_there: Callable[[], bool], what: str) -> None:
        """Ask every 2 ms until it is there. Raises Failed after ``LONGEST``, or when the agent has ended."""
        end = time.monotonic() + LONGEST
        while not is_there():
            if self._process.poll() is not None:
                words = (self._root / "agent.log").read_text(errors="replace").strip().splitlines()
                said = words[-1] if words else "no word"
                raise Failed(f"drift-repair: the agent ended with {self._process.returncode}: {said}")
            if time.monotonic() > end:
                raise Failed(f"drift-repair: {what} not there after {LONGEST:g} s")
            time.sleep(0.002)


@contextmanager
def _running_agent(namespace: str, root: Path) -> Iterator[RunningAgent]:
    """Run an agent while the body runs."""
    view = mounts.NodeView(root, root / "objects")
    view.make()
    config = {
        "apiVersion": "nodeplane.dev/v1alpha1",
        "kind": "NodeConfiguration",
        "nodeName": cluster.NODE,
        "iptablesVariant": "legacy",
        "services": {"clusterCIDR": cluster.CLUSTER_CIDR},
    }
    (root / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "nodeplane", "agent", "--config", str(root / "config.yaml")]
    environment = {**os.environ, "PATH": os.pathsep.join([str(_copying_restore(root)), os.environ.get("PATH", os.defpath)])}
    with (root / "agent.log").open("wb") as log:
        process = mounts.popen(
            namespace,
            view,
            [*command, "--objects", str(root / "objects")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        yield RunningAgent(process, root)
    finally:
        process.terminate()
        try:
            process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _copying_restore(root: Path) -> Path:
    """Make a directory for PATH in which iptables-legacy-restore keeps a copy of what it is fed. Raises Failed."""
    real = shutil.which(RESTORE, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if real is None:
        raise Failed(f"drift-repair: {RESTORE} is not installed")
    directory = root / "bin"
    directory.mkdir()
    script = directory / RESTORE
    script.write_text(f'#!/bin/sh\ntee -a {root}/fed | {real} "$@"\n')
    script.chmod(0o755)
    return directory
