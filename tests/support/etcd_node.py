"""The real program as one node of a cluster whose leases are in etcd: its own namespaces, its files in a directory of the test.

network namespace     eth0 192.168.1.1/24, etcd on 127.0.0.1:2379
mount namespace       /run/nodeplane  -> DIR/run       /var/lib/nodeplane -> DIR/lib
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
from etcd_server import EtcdServer, wait_for

from kernelstate.linux import netns
from kernelstate.linux.links import LinuxLinks
from kernelstate.objects.links import LinkState
from nodeplane.status import Status, read_status, status_lines

SCRIPT = """
set -e
mount -t tmpfs run /run; mount -t tmpfs lib /var/lib
mkdir /run/nodeplane /var/lib/nodeplane
mount --bind "$1/run" /run/nodeplane; mount --bind "$1/lib" /var/lib/nodeplane
shift
exec "$@"
"""


class EtcdNode:
    """Node n1. ``overlay`` are fields of its configuration besides the registry."""

    def __init__(self, space: str, directory: Path, server: EtcdServer, **overlay: object) -> None:
        self.space, self.directory = space, directory
        for name in ("run", "lib", "objects"):
            (directory / name).mkdir()
        registry = {"type": "etcd", "endpoints": [server.url]}
        self.subnet_file = directory / "subnet.env"
        config = {
            "apiVersion": "nodeplane.dev/v1alpha1",
            "kind": "NodeConfiguration",
            "nodeName": "n1",
            "services": False,
            "overlay": {"iface": "eth0", "subnetFile": str(self.subnet_file), "registry": registry, **overlay},
        }
        (directory / "config.json").write_text(json.dumps(config))
        self.make_uplink()
        self._process: subprocess.Popen | None = None

    def make_uplink(self) -> None:
        """Make the link to the other nodes, of which there are none."""
        netns.run(self.space, ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"])
        netns.run(self.space, ["ip", "addr", "add", "192.168.1.1/24", "dev", "eth0"])
        for link in ("eth0", "eth1"):
            netns.run(self.space, ["ip", "link", "set", link, "up"])

    def start(self) -> None:
        """Start the agent."""
        assert self._process is None
        program = [sys.executable, "-m", "nodeplane", "agent"]
        files = ["--config", str(self.directory / "config.json"), "--objects", str(self.directory / "objects")]
        argv = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            SCRIPT,
            "sh",
            str(self.directory),
            *program,
            *files,
        ]
        with (self.directory / "log").open("ab") as log:
            self._process = netns.popen(self.space, argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    @property
    def log(self) -> str:
        """What it has said."""
        return (self.directory / "log").read_text()

    def status(self) -> Status:
        """Return what it says of itself, once that is of this process."""
        return wait_for(self._status, f"a status: {self.log[-2000:]}")

    def _status(self) -> Status | None:
        assert self._process is not None
        assert self._process.poll() is None, self.log[-4000:]
        try:
            found = read_status(self.directory / "run" / "status.json")
        except msgspec.DecodeError:
            return None
        return found if found is not None and found.pid == self._process.pid else None

    def text(self) -> str:
        """Return the status as people read it."""
        return "\n".join(status_lines(self.status(), running=True))

    def state(self, *links: str) -> LinkState:
        """Return what the kernel holds of ours."""
        with netns.inside(self.space):
            fresh = LinuxLinks()
            try:
                return fresh.observe(links, ())
            finally:
                fresh.close()
