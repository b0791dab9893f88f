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

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from bench import cluster
from bench.kernel import may_use_kernel, own_namespace
from bench.result import Options, Row, against, median
from bench.running import LONGEST, RunningAgent, configuration, running_agent
from kernelstate.linux import netns
from kernelstate.linux.iptables import entries
from nodeplane.commands import Failed

SERVICES = 1_000
REPEATS = 5
RESTORE = "iptables-legacy-restore"


def measure(options: Options, repeats: int = REPEATS) -> list[Row]:
    """Measure at one size. Raises Failed."""
    if not may_use_kernel():
        raise Failed("drift-repair: an agent in a namespace of its own needs root")
    if options.mode != "iptables":
        raise Failed("drift-repair: what is flushed is iptables' table, measured in mode iptables only")
    services = options.services or SERVICES

    def row(name: str, metric: str, value: float, unit: str) -> Row:
        return Row(name, options.mode, {"services": services}, metric, value, unit)

    with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory, own_namespace() as namespace:
        root = Path(directory)
        cluster.write_directory(root / "objects", services)
        path = os.pathsep.join([str(_copying_restore(root)), os.environ.get("PATH", os.defpath)])
        fed = _Fed(root)
        with running_agent(namespace, root, configuration("iptables"), {**os.environ, "PATH": path}) as agent:
            agent.wait(agent.is_synced, "the first sync")
            first = row("first sync", "text size", fed.size(), "bytes")
            rows = [first, row("first sync", "agent's peak RSS", agent.peak_rss(), "MB")]
            for name, chain in (("nat flushed", []), ("one chain flushed", [_some_chain(namespace)])):
                times, written = zip(*[_repair(namespace, agent, fed, chain) for _ in range(repeats)], strict=True)
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


def _repair(namespace: str, agent: RunningAgent, fed: _Fed, chain: list[str]) -> tuple[float, int]:
    """Flush once; return milliseconds until the nat table's entries are back, and the bytes fed to restore for it."""
    with netns.inside(namespace):
        whole, before, last = entries(4, "nat"), fed.size(), agent.last_sync()
        subprocess.run(["iptables-legacy", "-w", "5", "-t", "nat", "-F", *chain], check=True, timeout=LONGEST)
        started = time.perf_counter()
        agent.wait(lambda: entries(4, "nat") == whole, "the nat table's entries")
        took = 1000 * (time.perf_counter() - started)
    agent.wait(lambda: agent.last_sync() > last and agent.is_synced(), "the agent's word that it is in sync")
    return took, fed.size() - before


class _Fed:
    """What the agent's iptables-legacy-restore was fed, seen from outside."""

    def __init__(self, root: Path) -> None:
        self._copy = root / "fed"

    def size(self) -> int:
        """Return how many bytes so far."""
        try:
            return self._copy.stat().st_size
        except FileNotFoundError:
            return 0


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
