"""The real program as a daemon: in a network namespace, with /run and /var/lib of its own in a directory of the test.

network namespace     loopback and eth0 192.168.1.1/24
mount namespace       /run/nodeplane  -> DIR/run       /var/lib/nodeplane -> DIR/lib
files                 DIR/conf/config.yaml             DIR/objects/*.yaml          DIR/log
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import msgspec
from patience import eventually

from kernelstate.linux import netns
from nodeplane.status import Status, read_status

SCRIPT = """
set -e
mount -t tmpfs run /run; mount -t tmpfs lib /var/lib
mkdir /run/nodeplane /var/lib/nodeplane
mount --bind "$1/run" /run/nodeplane; mount --bind "$1/lib" /var/lib/nodeplane
shift
exec "$@"
"""
SECONDS = 20.0
NODE = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "n1"},
    "spec": {"podCIDRs": ["10.244.1.0/24"]},
    "status": {"addresses": [{"type": "InternalIP", "address": "192.168.1.1"}]},
}


class DaemonNode:
    """Node n1. ``start`` and ``end`` as often as one likes."""

    def __init__(self, space: str, directory: Path, *, link: bool = True, **fields: Any) -> None:
        """Take fields of the NodeConfiguration; ``link`` False: the namespace has an eth0."""
        self.space, self.directory = space, directory
        for name in ("run", "lib", "objects", "conf"):
            (directory / name).mkdir()
        self.config = directory / "conf/config.yaml"
        self.configure(**fields)
        self.put("node", NODE)
        for command in (
            ()
            if not link
            else ("link add eth0 type veth peer name eth1", "addr add 192.168.1.1/24 dev eth0", "link set eth0 up")
        ):
            netns.run(space, ["ip", *command.split()])
        self.process: subprocess.Popen[bytes] | None = None

    def configure(self, **fields: Any) -> None:
        """Write the configuration file, as people should: the new file takes the old one's place."""
        services = {"clusterCIDR": "10.244.0.0/16", "mode": "nftables", **fields.pop("services", {})}
        whole = {"apiVersion": "nodeplane.dev/v1alpha1", "kind": "NodeConfiguration", "nodeName": "n1", "services": services}
        self.write(msgspec.json.encode(whole | fields))

    def write(self, content: bytes) -> None:
        """Write anything at all in place of the configuration."""
        fresh = self.config.with_suffix(".tmp")
        fresh.write_bytes(content)
        fresh.replace(self.config)

    def put(self, name: str, manifest: Any) -> None:
        """Write an object."""
        fresh = self.directory / f"objects/.{name}"
        fresh.write_bytes(msgspec.json.encode(manifest))
        fresh.replace(self.directory / f"objects/{name}.yaml")

    def start(self, *flags: str, config: bool = True, kubeconfig: Path | None = None, **environment: str) -> None:
        """Start the agent, on its files or on an API server."""
        assert self.process is None
        source = ("--kubeconfig", kubeconfig) if kubeconfig else ("--objects", self.directory / "objects")
        program = [sys.executable, "-m", "nodeplane", "agent", *map(str, source), *flags]
        program += ["--config", str(self.config)] if config else []
        mounts = ["unshare", "--mount", "--propagation", "private", "sh", "-c", SCRIPT, "sh", str(self.directory)]
        with (self.directory / "log").open("ab") as log:
            self.process = netns.popen(
                self.space,
                [*mounts, *program],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
            )

    def send(self, number: int) -> None:
        """Send a signal."""
        assert self.process is not None
        os.kill(self.process.pid, number)

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it; return its exit code."""
        if self.process is None:
            return 0
        self.process.send_signal(number)
        code = self.process.wait(SECONDS)
        self.process = None
        return code

    @property
    def log(self) -> str:
        """What it has said."""
        return (self.directory / "log").read_text()

    def status(self) -> Status | None:
        """Return what this process says of itself; None as long as it says nothing."""
        assert self.process is not None
        assert self.process.poll() is None, self.log[-4000:]
        try:
            found = read_status(self.directory / "run/status.json")
        except msgspec.DecodeError:
            return None
        return found if found is not None and found.pid == self.process.pid else None

    def synced(self) -> Status:
        """Wait until all is in the kernel."""
        status = eventually(lambda: (s := self.status()) and s.synced and s, SECONDS, f"not in sync: {self.log[-2000:]}")
        assert isinstance(status, Status)
        return status

    def get(self, port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
        """Ask one of its servers; return status and body."""
        with netns.inside(self.space):
            connection = HTTPConnection(host, port, timeout=5)
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, answer.read().decode()
            finally:
                connection.close()

    def metrics(self) -> dict[str, float]:
        """Return every sample: name with labels, value."""
        status, text = self.get(10249, "/metrics")
        assert status == 200
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if not line.startswith("#")
        }
