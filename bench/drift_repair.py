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
    with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory, own_namespace() as namespace:
        root = Path(directory)
        cluster.write_directory(root / "objects", services)
        with _agent(namespace, root) as alive:
            _wait(lambda: _is_synced(root), alive, "the first sync")
            first = _fed(root)
            flushes: dict[str, list[str]] = {"nat flushed": [], "one chain flushed": [_some_chain(namespace)]}
            repairs = {
                name: [_repair(namespace, root, alive, chain) for _ in range(repeats)] for name, chain in flushes.items()
            }

    def row(name: str, metric: str, value: float, unit: str) -> Row:
        return Row(name, options.mode, {"services": services}, metric, value, unit)

    rows = [row("first sync", "text size", first, "bytes")]
    for name, found in repairs.items():
        times, written = zip(*found, strict=True)
        rows += [
            row(name, "until back median", median(times), "ms"),
            row(name, "until back longest", max(times), "ms"),
            against(row(name, "text size", median(written), "bytes"), first, "first sync's text"),
        ]
    return rows


def _some_chain(namespace: str) -> str:
    """Return one Service's chain."""
    listing = netns.run(namespace, ["iptables-legacy-save", "-t", "nat"], timeout=LONGEST)
    return min(line.split()[0][1:] for line in listing.splitlines() if line.startswith(":KUBE-SVC-"))


def _repair(namespace: str, root: Path, alive: Callable[[], None], chain: list[str]) -> tuple[float, int]:
    """Flush once; return milliseconds until the nat table's entries are back, and the bytes fed to restore for it."""
    with netns.inside(namespace):
        whole, fed, last = entries(4, "nat"), _fed(root), _last_sync(root)
        subprocess.run(["iptables-legacy", "-w", "5", "-t", "nat", "-F", *chain], check=True, timeout=LONGEST)
        started = time.perf_counter()
        _wait(lambda: entries(4, "nat") == whole, alive, "the nat table's entries")
        took = 1000 * (time.perf_counter() - started)
    _wait(lambda: _last_sync(root) > last and _is_synced(root), alive, "the agent's word that it is in sync")
    return took, _fed(root) - fed


@contextmanager
def _agent(namespace: str, root: Path) -> Iterator[Callable[[], None]]:
    """Run an agent while the body runs; yields a check that raises Failed once it has ended."""
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

    def alive() -> None:
        if process.poll() is not None:
            words = (root / "agent.log").read_text(errors="replace").strip().splitlines()
            raise Failed(f"drift-repair: the agent ended with {process.returncode}: {words[-1] if words else 'no word'}")

    try:
        yield alive
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


def _fed(root: Path) -> int:
    try:
        return (root / "fed").stat().st_size
    except FileNotFoundError:
        return 0


def _is_synced(root: Path) -> bool:
    status = read_status(root / "run/status.json")
    return status is not None and status.synced


def _last_sync(root: Path) -> float:
    status = read_status(root / "run/status.json")
    return status.last_sync if status else 0.0


def _wait(is_there: Callable[[], bool], alive: Callable[[], None], what: str) -> None:
    """Ask every 2 ms until it is there. Raises Failed after ``LONGEST``, or when the agent has ended."""
    end = time.monotonic() + LONGEST
    while not is_there():
        alive()
        if time.monotonic() > end:
            raise Failed(f"drift-repair: {what} not there after {LONGEST:g} s")
        time.sleep(0.002)
