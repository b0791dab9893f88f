"""Two nodes that agree on nothing but the packets between them: our forwarder on one, a plain tunnel in Python on the other.

    pod a 10.244.1.7 --veth-- node a  flannel0 => nodeplane-udp => eth0 192.168.1.1
                                                                     | veth
    pod b 10.244.2.7 --veth-- node b  flannel0 => plain Python  => eth0 192.168.1.2

The other end's TUN has no virtio headers, as flannel's has none: what reaches it unfinished stays unfinished.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from ipaddress import ip_address, ip_network
from pathlib import Path

import plain_udp_tunnel
from overlay_nets import batch
from udp_nodes import without_offloads

from kernelstate.linux import netns
from kernelstate.linux.tun import make_tun
from nodeplane.host_kernel import FORWARDER

PORT, TUN, MTU = 8285, "flannel0", 1452
SECONDS = 5.0
SO_RCVBUFFORCE = 33
NUMBERS = {"a": 1, "b": 2}


def pod_ip(end: str, family: int) -> str:
    """Return the address of an end's pod."""
    return f"10.244.{NUMBERS[end]}.7" if family == 4 else f"fd00:244:0:{NUMBERS[end]}::7"


class MixedTunnel:
    """Both nodes, their pods, and both forwarders; ``close`` ends what was started."""

    def __init__(self, make_netns: Callable[[], str], directory: Path, *, offloads: bool = True) -> None:
        self.node, self.pod = ({end: make_netns() for end in NUMBERS} for _ in range(2))
        self.control = directory / "forwarder.sock"
        self._undo = ExitStack()
        try:
            self._open(offloads=offloads)
        except BaseException:
            self._undo.close()
            raise

    def _open(self, *, offloads: bool) -> None:
        batch(self.node["a"], f"link add eth0 type veth peer name eth0 netns {self.node['b']}")
        for end in NUMBERS:
            self._join(end)
            if not offloads:
                for space, link in ((self.node[end], "eth0"), (self.node[end], "pod"), (self.pod[end], "eth0")):
                    without_offloads(space, link)
        with netns.inside(self.node["b"]):
            queue = plain_udp_tunnel.attach(TUN, vnet=False)
        parent = os.getpid()
        self._peer = os.fork()
        if not self._peer:
            try:
                self._plain_tunnel(queue, parent)
            finally:
                os._exit(1)
        self._undo.callback(self._end_peer)
        os.close(queue)
        with netns.inside(self.node["a"]):
            assert make_tun(TUN) == ""
        for end in NUMBERS:
            self._route(end)
        self.program = self.start()
        self.ask("peer 10.244.2.0/24 192.168.1.2 8285\npeer fd00:244:0:2::/64 fd00:1::2 8285\n")

    def _join(self, end: str) -> None:
        number = NUMBERS[end]
        batch(
            self.node[end],
            f"""addr add 192.168.1.{number}/24 dev eth0
            addr add fd00:1::{number}/64 dev eth0 nodad
            link set eth0 up
            link add pod type veth peer name eth0 netns {self.pod[end]}
            link set pod up mtu {MTU}
            addr add 169.254.1.1/32 dev pod
            addr add fe80::1/64 dev pod nodad
            route add {pod_ip(end, 4)} dev pod
            route add {pod_ip(end, 6)} dev pod""",
        )
        batch(
            self.pod[end],
            f"""link set eth0 up mtu {MTU}
            addr add {pod_ip(end, 4)}/32 dev eth0
            addr add {pod_ip(end, 6)}/128 dev eth0 nodad
            route add 169.254.1.1 dev eth0
            route add default via 169.254.1.1 dev eth0
            route add default via fe80::1 dev eth0""",
        )
        sysctls = ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1", "net.ipv4.conf.all.rp_filter=1"]
        netns.run(self.node[end], ["sysctl", "-qw", *sysctls])

    def _route(self, end: str) -> None:
        """Give the TUN, once it is there, its addresses and the pod network."""
        number = NUMBERS[end]
        batch(
            self.node[end],
            f"""addr add 10.244.{number}.0/32 dev {TUN}
            addr add fd00:244:0:{number}::/128 dev {TUN} nodad
            link set {TUN} up mtu {MTU}
            route add 10.244.0.0/16 dev {TUN}
            route add fd00:244::/48 dev {TUN}""",
        )

    # -- the other end -----------------------------------------------------------------------------------------------

    def _plain_tunnel(self, queue: int, parent: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        netns.enter(self.node["b"])
        local = [ip_address(a) for a in ("192.168.1.2", "fd00:1::2")]
        sockets = {a: plain_udp_tunnel.bind(str(a), PORT) for a in local}
        for sock in sockets.values():  # slow as it is, it should not lose what comes in bursts
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        tunnel = plain_udp_tunnel.PlainTunnel(queue, sockets, vnet=False)
        tunnel.peers = {
            ip_network("10.244.1.0/24"): (ip_address("192.168.1.1"), PORT),
            ip_network("fd00:244:0:1::/64"): (ip_address("fd00:1::1"), PORT),
        }
        while os.getppid() == parent:
            for ready in select.select([queue, *sockets.values()], [], [], 1.0)[0]:
                try:
                    tunnel.from_tun() if ready == queue else tunnel.from_socket(ready)
                except OSError:
                    continue  # nothing there after all, or the TUN is not up yet

    def _end_peer(self) -> None:
        os.kill(self._peer, signal.SIGTERM)
        os.waitpid(self._peer, 0)

    # -- our forwarder -----------------------------------------------------------------------------------------------

    def start(self, *more: str) -> subprocess.Popen[str]:
        """Start a forwarder and wait until it answers itself; what ``--take-over`` replaces ends meanwhile."""
        words = ["--tun", TUN, "--port", str(PORT), "--local", "192.168.1.1", "--local", "fd00:1::1"]
        argv = [str(FORWARDER), *words, "--control", str(self.control), *more]
        program = netns.popen(self.node["a"], argv, stderr=subprocess.PIPE, text=True)
        self._undo.callback(self._end, program)
        assert program.stderr is not None
        for _ in range(int(SECONDS / 0.005)):
            if program.poll() is not None or f"pid {program.pid}\n" in self._version():
                return program
            select.select([program.stderr], [], [], 0.005)
        raise AssertionError("the forwarder does not answer")

    def _version(self) -> str:
        try:
            return self.ask("show version\n")
        except OSError:
            return ""

    @staticmethod
    def _end(program: subprocess.Popen[str]) -> None:
        program.terminate()
        program.communicate(timeout=SECONDS)

    def ask(self, request: str) -> str:
        """Send a request to our forwarder and return the answer."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(SECONDS)
            sock.connect(str(self.control))
            sock.send(request.encode())
            answer = ""
            while not answer.endswith("ok\n"):
                message = sock.recv(1 << 16).decode()
                if not message:
                    raise ConnectionResetError(errno.ECONNRESET, f"closed after {answer!r}")
                assert not message.startswith("error"), message
                answer += message
            return answer

    def counters(self) -> dict[str, int]:
        """Return our forwarder's counters."""
        lines = self.ask("show counters\n").splitlines()[:-1]
        return {name: int(value) for name, value in (line.split() for line in lines)}

    def socket(self, end: str, family: int, kind: socket.SocketKind) -> socket.socket:
        """Make a socket in an end's pod, bound to the pod's address; it lives until ``close``."""
        with netns.inside(self.pod[end]):
            made = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind)
        self._undo.enter_context(made)
        made.settimeout(SECONDS)
        made.bind((pod_ip(end, family), 0))
        return made

    def close(self) -> None:
        """End everything that was started."""
        self._undo.close()
