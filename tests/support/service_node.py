"""One node with pods and an outside host, each a namespace with real sockets, for tests of what happens to flows.

    pod 1  10.244.1.2  fd00:244:1::2 ---.
    pod 2  10.244.2.2  fd00:244:2::2 ----  node  192.168.1.1  fd00:99::1 --- outside  192.168.1.2  fd00:99::2
    pod n  10.244.n.2  fd00:244:n::2 ---'

The node forwards; programming Services is the test's business.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack

import patience

from kernelstate.linux import netns

NODE_IPS = {4: "192.168.1.1", 6: "fd00:99::1"}
OUTSIDE_IPS = {4: "192.168.1.2", 6: "fd00:99::2"}
SOCKET_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
TIMEOUT = 5.0


def pod_ip(number: int, family: int = 4) -> str:
    """Return the address of pod 1, 2, ..."""
    return f"10.244.{number}.2" if family == 4 else f"fd00:244:{number}::2"


class ServiceNode:
    """The namespaces, and sockets in them; ``close`` closes what was opened."""

    def __init__(self, make_netns: Callable[[], str], pods: int) -> None:
        self.node, self.outside = make_netns(), make_netns()
        self.pods = {number: make_netns() for number in range(1, pods + 1)}
        self._undo = ExitStack()
        self._join(self.outside, "eth0", ("192.168.1.1/24", "fd00:99::1/64"), ("192.168.1.2/24", "fd00:99::2/64"))
        for number, space in self.pods.items():
            inner, outer = (f"10.244.{number}.{i}/24" for i in (2, 1))
            inner6, outer6 = (f"fd00:244:{number}::{i}/64" for i in (2, 1))
            self._join(space, f"pod{number}", (outer, outer6), (inner, inner6))
        routes = [f"route add default via {OUTSIDE_IPS[family]}" for family in (4, 6)]
        netns.run(self.node, ["ip", "-batch", "-"], stdin="\n".join(routes))
        sysctls = ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1", "net.ipv4.conf.all.rp_filter=1"]
        netns.run(self.node, ["sysctl", "-qw", *sysctls])

    def _join(self, space: str, link: str, node_side: tuple[str, str], far_side: tuple[str, str]) -> None:
        netns.run(
            self.node,
            ["ip", "-batch", "-"],
            stdin=f"""link add {link} type veth peer name eth0 netns {space}
            addr add {node_side[0]} dev {link}
            addr add {node_side[1]} dev {link} nodad
            link set {link} up""",
        )
        netns.run(
            space,
            ["ip", "-batch", "-"],
            stdin=f"""addr add {far_side[0]} dev eth0
            addr add {far_side[1]} dev eth0 nodad
            link set eth0 up
            route add default via {node_side[0].split("/")[0]}
            route add default via {node_side[1].split("/")[0]}""",
        )

    def close(self) -> None:
        """Close every socket."""
        self._undo.close()

    def socket(
        self, space: str, family: int = 4, kind: socket.SocketKind = socket.SOCK_STREAM, protocol: int = 0
    ) -> socket.socket:
        """Make a socket inside a namespace; it lives until ``close``."""
        with netns.inside(space):
            made = self._undo.enter_context(socket.socket(SOCKET_FAMILY[family], kind, protocol))
        made.settimeout(TIMEOUT)
        return made

    def listen(self, pod: int, port: int, family: int = 4) -> socket.socket:
        """Listen for TCP in a pod."""
        server = self.socket(self.pods[pod], family)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((pod_ip(pod, family), port))
        server.listen(64)
        return server

    def connect(self, space: str, address: str, port: int) -> socket.socket:
        """Connect from a namespace."""
        client = self.socket(space, 6 if ":" in address else 4)
        client.connect((address, port))
        return client

    def accept(self, server: socket.socket) -> socket.socket:
        """Take a connection; it lives until ``close``."""
        accepted = self._undo.enter_context(server.accept()[0])
        accepted.settimeout(TIMEOUT)
        return accepted


def end_of(connection: socket.socket, seconds: float = TIMEOUT) -> str:
    """Wait for what a quiet connection hears next: ``reset``, ``closed``, ``data``, or ``silence`` after so many seconds."""
    connection.settimeout(seconds)
    try:
        return "data" if connection.recv(100) else "closed"
    except ConnectionResetError:
        return "reset"
    except TimeoutError:
        return "silence"


def eventually(condition: Callable[[], object], seconds: float = TIMEOUT) -> object:
    """Poll a condition until it is true and return its value; fail after ``seconds``."""
    return patience.eventually(condition, seconds)
