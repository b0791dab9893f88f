"""A real agent in a network namespace, with files of its own below one directory, and what can be seen of it from outside.

    ROOT/objects       the cluster, as the caller has written it, unless there is a server
    ROOT/config.yaml   the configuration
    ROOT/agent.log     what the agent says
    ROOT/run           its /run/nodeplane: status.json

The agent ends with the body; the kernel goes on as it programmed it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import cluster
from bench.fresh import memory
from netnslab import mounts
from nodeplane.commands import Failed
from nodeplane.status import read_status

LONGEST = 60.0
"""Seconds until something that should happen is given up."""


def configuration(mode: str, **options: Any) -> dict[str, Any]:
    """Return a NodeConfiguration for the made-up cluster; ``options`` are fields of ``serviceOptions``."""
    return {
        "apiVersion": "nodeplane.dev/v1alpha1",
        "kind": "NodeConfiguration",
        "nodeName": cluster.NODE,
        "iptablesVariant": "legacy",
        "services": {"mode": mode, "clusterCIDR": cluster.CLUSTER_CIDR},
        **({"serviceOptions": options} if options else {}),
    }


class RunningAgent:
    """An agent's process, and what can be seen of it from outside."""

    def __init__(self, process: subprocess.Popen[bytes], root: Path) -> None:
        self._process = process
        self._root = root

    def is_synced(self, services: int | None = None) -> bool:
        """Whether its status says so, with that many Services where a number is given."""
        status = read_status(self._root / "run/status.json")
        return status is not None and status.synced and services in {None, status.services}

    def endpoints(self) -> int:
        """Return how many endpoints its status counts."""
        status = read_status(self._root / "run/status.json")
        return status.endpoints if status else 0

    def peers(self) -> int:
        """Return how many other nodes its status names."""
        status = read_status(self._root / "run/status.json")
        return len(status.peers) if status else 0

    def last_sync(self) -> float:
        """Return when its status says it was last in sync, in seconds since the epoch."""
        status = read_status(self._root / "run/status.json")
        return status.last_sync if status else 0.0

    def peak_rss(self) -> float:
        """Return its largest resident size so far in MB."""
        return memory("VmHWM", Path(f"/proc/{self._process.pid}/status"))

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def cpu(self) -> float:
        """Return the CPU time it has used so far in seconds, all threads together. Source: proc(5), stat fields 14 and 15."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait(self, is_there: Callable[[], bool], what: str, longest: float = LONGEST) -> None:
        """Ask every 2 ms until it is there. Raises Failed after ``longest`` seconds, or when the agent has ended."""
        end = time.monotonic() + longest
        while not is_there():
            if self._process.poll() is not None:
                raise Failed(f"the agent ended with {self._process.returncode}: {self._last_words()}")
            if time.monotonic() > end:
                raise Failed(f"{what} not there after {longest:g} s; the agent said last: {self._last_words()}")
            time.sleep(0.002)

    def _last_words(self) -> str:
        words = (self._root / "agent.log").read_text(errors="replace").strip().splitlines()
        return words[-1] if words else "no word"


@contextmanager
def running_agent(  # noqa: PLR0917 (the first three are what it is, the rest what some need)
    namespace: str,
    root: Path,
    config: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    kubeconfig: Path | None = None,
    cgroup: Path | None = None,
) -> Iterator[RunningAgent]:
    """Run an agent while the body runs, over ROOT/objects or a kubeconfig's server; ``environment`` None is this process's.

    ``cgroup``: that of its pods' processes, which it sees at ``mounts.CGROUP``.
    """
    view = mounts.NodeView(root, root / "objects", cgroup)
    view.make()
    view.objects.mkdir(exist_ok=True)
    (root / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "nodeplane", "agent", "--config", str(root / "config.yaml")]
    with (root / "agent.log").open("wb") as log:
        process = mounts.popen(
            namespace,
            view,
            [*command, *(("--kubeconfig", str(kubeconfig)) if kubeconfig else ("--objects", str(root / "objects")))],
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
