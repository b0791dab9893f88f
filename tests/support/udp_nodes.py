"""Nodes with real agents and the UDP backend: namespaces on one segment, each with a pod in a namespace of its own.

    pod p1 eth0 10.244.1.7 --veth-- node n1  flannel0 | eth0 192.168.1.1 --veth-- bridge namespace --veth-- node n2 ... pod p2

The agents are forked from the test (``ForkedAgent``); the forwarder is a process of its own, started by them: the stand-in in
plain Python, or the one that was built.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import plain_udp_tunnel
from forked_agent import ForkedAgent
from overlay_nets import batch

from kernelstate.linux import ethtool, netns
from kernelstate.linux.forwarder import LinuxForwarder
from nodeplane.host_kernel import FORWARDER

NODES = """
apiVersion: v1
kind: Node
metadata: {{name: n{i}}}
spec: {{podCIDR: 10.244.{i}.0/24, podCIDRs: [10.244.{i}.0/24, "fd00:244:0:{i}::/64"]}}
status: {{addresses: [{{type: InternalIP, address: 192.168.1.{i}}}, {{type: InternalIP, address: "fd00:1::{i}"}}]}}
---
"""
OVERLAY = {
    "Network": "10.244.0.0/16",
    "EnableIPv6": True,
    "IPv6Network": "fd00:244::/48",
    "Backend": {"Type": "udp", "Engine": "userspace"},
}
KERNEL = {**OVERLAY, "Backend": {"Type": "udp", "Engine": "kernel"}}
POD_MTU = 1452


def write_program(file: Path, note: str = "") -> Path:
    """Write the stand-in as a program; another ``note`` makes it another program that does the same."""
    text = f"#!{sys.executable}\n# {note}\n{Path(plain_udp_tunnel.__file__).read_text()}"
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.chmod(0o755)
    fresh.replace(file)
    return file


def built_program(file: Path, note: str = "") -> Path:
    """Copy the forwarder that was built; ``note`` is put behind its end, where no loader looks."""
    fresh = file.with_suffix(".new")
    fresh.write_bytes(FORWARDER.read_bytes() + note.encode())
    fresh.chmod(0o755)
    fresh.replace(file)
    return file


def without_offloads(space: str, link: str) -> None:
    """Let the kernel finish checksums and segments before a link: a veth passes them on unfinished, which no wire does."""
    with netns.inside(space):
        for command in (ethtool.SET_TX_CHECKSUM, ethtool.SET_TSO, ethtool.SET_GSO):
            ethtool.switch(link, command, on=False)


class UdpNode:
    """One node, its pod, and its agent."""

    def __init__(
        self, number: int, bridge: str, spaces: tuple[str, str], directory: Path, *, program: Path, overlay: dict
    ) -> None:
        space, pod = spaces
        self.bridge = bridge
        self.number, self.space, self.pod, self.directory = number, space, pod, directory
        self.pods = {4: f"10.244.{number}.7", 6: f"fd00:244:0:{number}::7"}
        batch(
            space,
            f"""link add eth0 type veth peer name p{number} netns {bridge}
            addr add 192.168.1.{number}/24 dev eth0
            addr add fd00:1::{number}/64 dev eth0 nodad
            link set eth0 up
            link add pod type veth peer name eth0 netns {pod}
            link set pod up mtu {POD_MTU}
            addr add 169.254.1.1/32 dev pod
            addr add fe80::1/64 dev pod nodad
            route add {self.pods[4]} dev pod
            route add {self.pods[6]} dev pod""",
        )
        batch(bridge, f"link set p{number} master br0 up")
        batch(
            pod,
            f"""link set eth0 up mtu {POD_MTU}
            addr add {self.pods[4]}/32 dev eth0
            addr add {self.pods[6]}/128 dev eth0 nodad
            route add 169.254.1.1 dev eth0
            route add default via 169.254.1.1 dev eth0
            route add default via fe80::1 dev eth0""",
        )
        without_offloads(space, "eth0")
        self.forwarder = LinuxForwarder(program, directory)
        self.agent = ForkedAgent(
            space,
            directory.parent / "objects",
            directory / "status.json",
            {},
            node=f"n{number}",
            overlay={**overlay, "iface": "eth0", "subnetFile": str(directory / "subnet.env")},
            forwarder=lambda: LinuxForwarder(program, directory),
        )

    def forwarder_pid(self) -> int:
        """Return the pid of the forwarder that runs."""
        with self.forwarder._control("show version") as control:
            return int(control.values("show version")["pid"])

    def close(self) -> None:
        """End agent and forwarder."""
        self.agent.kill()
        with netns.inside(self.space):
            self.forwarder.stop()
        self.forwarder.close()


@contextmanager
def udp_nodes(
    make_netns: Callable[[], str], directory: Path, program: Path, count: int = 2, overlay: dict = OVERLAY
) -> Iterator[list[UdpNode]]:
    """Make nodes and their pods, with agents that are not started yet; everything ends at the end."""
    bridge = make_netns()
    batch(bridge, "link add br0 type bridge\nlink set br0 up")
    objects = directory / "objects"
    objects.mkdir()
    (objects / "nodes.yaml").write_text("".join(NODES.format(i=i) for i in range(1, count + 1)))
    (objects / ".generation").write_text("0")
    with ExitStack() as undo:
        nodes = []
        for i in range(1, count + 1):
            own = directory / f"n{i}"
            own.mkdir()
            node = UdpNode(i, bridge, (make_netns(), make_netns()), own, program=program, overlay=overlay)
            netns.run(node.space, ["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])
            undo.callback(node.close)
            nodes.append(node)
        yield nodes


class Load:
    """One TCP connection between two pods that never rests: numbers go out, come back, and the longest silence is measured."""

    def __init__(self, client: UdpNode, server: UdpNode, family: int = 4) -> None:
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        with netns.inside(server.pod):
            listener = socket.create_server((server.pods[family], 0), family=kind)
        with listener, netns.inside(client.pod):
            self.client = socket.create_connection(listener.getsockname()[:2], timeout=5)
            self.server, _ = listener.accept()
        self.client.setblocking(False)
        self.pid = os.fork()
        if not self.pid:
            os._exit(self._echo())
        self.sent = self.received = 0
        self.longest = 0.0
        self._last = time.monotonic()

    def _echo(self) -> int:
        self.client.close()
        try:
            while data := self.server.recv(1 << 16):
                self.server.sendall(data)
        except OSError:
            return 1
        return 0

    def run(self, seconds: float) -> None:
        """Keep 16 messages of 1200 bytes in flight for so long, noting every silence."""
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            with suppress(BlockingIOError):
                while self.sent - self.received < 16 * 1200:
                    self.sent += self.client.send(bytes(1200))
            if select.select([self.client], [], [], min(0.05, max(0.0, end - now)))[0]:
                data = self.client.recv(1 << 16)
                assert data, "the connection was lost"
                self.received += len(data)
                self.longest, self._last = max(self.longest, time.monotonic() - self._last), time.monotonic()
            self.longest = max(self.longest, time.monotonic() - self._last)

    def moves(self, seconds: float) -> bool:
        """Whether more than what may be under way comes back within so many seconds."""
        end, enough = time.monotonic() + seconds, self.received + 2 * 16 * 1200
        while self.received < enough and time.monotonic() < end:
            self.run(0.05)
        return self.received >= enough

    def rest(self) -> float:
        """Return the longest silence so far, and begin to measure anew."""
        longest, self.longest, self._last = self.longest, 0.0, time.monotonic()
        return longest

    def close(self) -> None:
        """End both ends; shut down and not merely closed, since agents that were forked meanwhile hold them as well."""
        for end in (self.server, self.client):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        os.waitpid(self.pid, 0)
