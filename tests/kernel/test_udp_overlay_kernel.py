"""The UDP backend on real nodes: pods reach each other, and agents and forwarders die, return and are exchanged under load."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import closing, suppress
from ipaddress import ip_address
from pathlib import Path

import msgspec
import pytest
from overlay_nets import batch
from udp_nodes import FORWARDER, KERNEL, OVERLAY, Load, UdpNode, built_program, udp_nodes, write_program

from kernelstate.features import Feature
from kernelstate.linux import netns, processes
from kernelstate.linux.bpf_tunnel import missing
from kernelstate.linux.forwarder import LinuxForwarder
from kernelstate.linux.tun import make_tun
from kernelstate.objects.address import Prefix
from kernelstate.objects.tunnel import TunnelPeer, UdpTunnel
from kernelstate.reconcile_forwarder import ForwarderReconciler
from overlay.netconf import UdpBackend, VxlanBackend

pytestmark = pytest.mark.kernel

REPAIR = 5.0
"""Seconds within which what somebody else broke is back."""
PROGRAMS = [write_program, built_program] if FORWARDER.exists() else [write_program]
program = PROGRAMS[-1]
"""The one that was built, where speed or the length of a gap counts."""


@pytest.fixture
def programs() -> None:
    """Skip what needs programs in the kernel where it takes none."""
    words = missing(FORWARDER.parent)
    if words:
        pytest.skip(f"{Feature.TUNNEL_PROGRAMS}: {words}")


def reached(a: UdpNode, b: UdpNode, family: int = 4, seconds: float = 5.0) -> bool:
    """Whether a datagram from a pod of ``a`` comes back from one of ``b``, each with its own address."""
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    with netns.inside(a.pod):
        client = socket.socket(kind, socket.SOCK_DGRAM)
    with netns.inside(b.pod):
        server = socket.socket(kind, socket.SOCK_DGRAM)
    with client, server:
        client.bind((a.pods[family], 0))
        server.bind((b.pods[family], 0))
        client.settimeout(0.1)
        server.settimeout(0.1)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                client.sendto(b"nodeplane", (b.pods[family], server.getsockname()[1]))
                data, source = server.recvfrom(100)
                assert source[0] == a.pods[family]
                server.sendto(data, source)
                return client.recv(100) == b"nodeplane"
            except TimeoutError:
                continue
    return False


def start(nodes: list[UdpNode]) -> None:
    for node in nodes:
        node.agent.start()
    for node in nodes:
        node.agent.wait(0)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_pods_reach_each_other(make_netns: Callable[[], str], tmp_path: Path, kind) -> None:
    """Pods of two nodes reach each other in both families; what nobody has is counted and goes nowhere."""
    with udp_nodes(make_netns, tmp_path, kind(tmp_path / "forwarder")) as nodes:
        start(nodes)
        a, b = nodes
        assert [reached(a, b, family) and reached(b, a, family) for family in (4, 6)] == [True, True]
        assert "10.244.0.0/16 dev flannel0" in netns.run(a.space, ["ip", "route"])
        before = a.forwarder.counters()
        with netns.inside(a.pod), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _ in range(20):
                with suppress(OSError):  # the answer to the one before: unreachable
                    sock.sendto(b"?", ("10.244.99.9", 9))
        end = time.monotonic() + REPAIR
        while (after := a.forwarder.counters())["no_route"] < before["no_route"] + 10 and time.monotonic() < end:
            select.select([], [], [], 0.02)
        assert after["no_route"] >= before["no_route"] + 10
        assert (after["sent_packets"], after["wrong_source"], after["unknown_peer"]) == (before["sent_packets"], 0, 0)
        assert before["sent_packets"] >= 4


GAP = 1.0
"""Seconds that a connection may stand still while agents and forwarders come and go."""


def test_nothing_is_lost_while_agents_and_forwarders_change(make_netns: Callable[[], str], tmp_path: Path) -> None:
    """A connection never rests for a second while the agent is killed, is away, returns, and exchanges the forwarder."""
    file = program(tmp_path / "forwarder")
    with udp_nodes(make_netns, tmp_path, file) as nodes, closing(Load(*_started(nodes))) as load:
        a = nodes[0]
        load.run(0.3)
        first = a.forwarder_pid()
        a.agent.kill()
        load.run(0.3)
        a.agent.start()
        load.run(0.5)
        a.agent.wait(0)
        assert (load.rest() < GAP, a.forwarder_pid()) == (True, first)
        a.agent.kill()
        program(file, "another version")
        a.agent.start()
        load.run(1.0)
        a.agent.wait(0)
        assert (load.rest() < GAP, a.forwarder_pid() != first, load.received > 100_000) == (True, True, True)
        assert running_forwarders(tmp_path / "n1") == [a.forwarder_pid()]
        assert a.forwarder.peers() == nodes_peers(2)


def test_damage_is_repaired(make_netns: Callable[[], str], tmp_path: Path) -> None:
    """A forwarder that is killed and a TUN that is deleted are back within seconds, and the connection with them."""
    with udp_nodes(make_netns, tmp_path, program(tmp_path / "forwarder")) as nodes, closing(Load(*_started(nodes))) as load:
        a = nodes[0]
        load.run(0.2)
        for damage in (
            lambda: os.kill(a.forwarder_pid(), signal.SIGKILL),
            lambda: netns.run(a.space, ["ip", "link", "del", "flannel0"]),
            lambda: netns.run(a.space, ["ip", "route", "del", "10.244.0.0/16"]),
        ):
            damage()
            assert load.moves(REPAIR)
            load.rest()
        assert running_forwarders(tmp_path / "n1") == [a.forwarder_pid()]


@pytest.mark.parametrize("kind", PROGRAMS)
def test_another_port_or_address(make_netns: Callable[[], str], tmp_path: Path, kind) -> None:
    """A forwarder that is wanted on another port or address is exchanged; one process is left, there and nowhere else."""
    space = make_netns()
    batch(space, "addr add 192.168.1.1/24 dev lo\naddr add 192.168.1.9/24 dev lo")
    tunnel = UdpTunnel("flannel0", "eth0", 8285, (ip_address("192.168.1.1"),), nodes_peers(2)[:1])
    with netns.inside(space), closing(LinuxForwarder(kind(tmp_path / "forwarder"), tmp_path)) as forwarder:
        assert make_tun("flannel0") == ""
        netns.run(space, ["ip", "link", "set", "flannel0", "up"])
        reconciler = ForwarderReconciler(forwarder)
        try:
            for port, local in ((8285, "192.168.1.1"), (9000, "192.168.1.1"), (9000, "192.168.1.9")):
                wanted = msgspec.structs.replace(tunnel, port=port, local=(ip_address(local),))
                reconciler.set_desired(wanted)
                assert reconciler.sync().errors == ()
                assert (forwarder.peers(), len(running_forwarders(tmp_path))) == (wanted.peers, 1)
                bound = {word for word in netns.run(space, ["ss", "-Hnlu"]).split() if word.endswith((":8285", ":9000"))}
                assert bound == {f"{local}:{port}"}
        finally:
            reconciler.cleanup()
        assert running_forwarders(tmp_path) == []


def test_a_forwarder_is_never_there_twice(make_netns: Callable[[], str], tmp_path: Path) -> None:
    """One whose socket somebody deleted, and one that hangs, are ended before another starts."""
    with udp_nodes(make_netns, tmp_path, program(tmp_path / "forwarder"), 1) as (a,):
        start([a])
        for spoil in (lambda _pid: a.forwarder.socket.unlink(), lambda pid: os.kill(pid, signal.SIGSTOP)):
            first = a.forwarder_pid()
            spoil(first)
            a.agent.kill()
            a.agent.start()
            a.agent.wait(0)
            assert a.forwarder_pid() != first
            assert running_forwarders(tmp_path / "n1") == [a.forwarder_pid()]


def test_a_new_version_that_cannot_start_leaves_the_old_one(make_netns: Callable[[], str], tmp_path: Path) -> None:
    """A forwarder that runs is kept when the one that should replace it ends at once; its words are in the error."""
    file = program(tmp_path / "forwarder")
    with udp_nodes(make_netns, tmp_path, file) as nodes:
        a, b = _started(nodes)
        first = a.forwarder_pid()
        a.agent.kill()
        file.unlink()
        file.write_text("#!/bin/sh\necho no room left >&2\nexit 1\n")
        file.chmod(0o755)
        a.agent.start()
        end = time.monotonic() + REPAIR
        while not ((status := a.agent.read()) and status.errors) and time.monotonic() < end:
            select.select([], [], [], 0.02)
        assert status is not None
        assert status.errors == (f"start {file}: no room left",)
        assert a.forwarder_pid() == first
        assert reached(a, b)


@pytest.mark.usefixtures("programs")
def test_kernel_engine(make_netns: Callable[[], str], tmp_path: Path) -> None:
    """With programs in the kernel the forwarder moves no packet, and neither its death nor the agent's stops a connection."""
    with udp_nodes(make_netns, tmp_path, program(tmp_path / "forwarder"), overlay=KERNEL) as nodes:
        a, b = _started(nodes)
        assert [reached(a, b, family) and reached(b, a, family) for family in (4, 6)] == [True, True]
        before = a.forwarder.counters()
        with closing(Load(a, b)) as load:
            load.run(0.3)
            after = a.forwarder.counters()
            assert [after[n] - before[n] for n in ("sent_packets", "received_packets")] == [0, 0]
            a.agent.kill()
            os.kill(a.forwarder_pid(), signal.SIGKILL)
            load.run(0.5)
            a.agent.start()
            load.run(0.5)
            a.agent.wait(0)
            assert load.rest() < GAP
            assert load.moves(REPAIR)
            netns.run(a.space, ["ip", "link", "del", "flannel0"])
            assert load.moves(REPAIR)


@pytest.mark.usefixtures("programs")
def test_engines_change_under_load(make_netns: Callable[[], str], tmp_path: Path) -> None:
    """A node goes from one engine to the other and back while a connection goes on; both ends need not have the same."""
    with udp_nodes(make_netns, tmp_path, program(tmp_path / "forwarder"), overlay=KERNEL) as nodes:
        a, b = _started(nodes)
        kernel = a.agent.config
        assert kernel.overlay is not None
        conf = msgspec.structs.replace(kernel.overlay.net_conf, backend=UdpBackend(engine="userspace"))
        userspace = msgspec.structs.replace(kernel, overlay=msgspec.structs.replace(kernel.overlay, net_conf=conf))
        with closing(Load(a, b)) as load:
            load.run(0.2)
            for config in (userspace, kernel):
                a.agent.kill()
                a.agent.config = config
                a.agent.start()
                load.run(0.7)
                a.agent.wait(0)
                assert load.rest() < GAP
                sent = a.forwarder.counters()["sent_packets"]
                assert load.moves(REPAIR)
                assert (a.forwarder.counters()["sent_packets"] > sent + 10) == (config is userspace)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("overlay", [OVERLAY, KERNEL])
def test_another_backend_ends_the_forwarder(make_netns: Callable[[], str], tmp_path: Path, overlay) -> None:
    """A node that is told to use vxlan instead leaves neither forwarder nor TUN behind; told udp again, both are there."""
    with udp_nodes(make_netns, tmp_path, program(tmp_path / "forwarder"), 1, overlay) as (a,):
        udp = a.agent.config
        assert udp.overlay is not None
        conf = msgspec.structs.replace(udp.overlay.net_conf, backend=VxlanBackend())
        vxlan = msgspec.structs.replace(udp, overlay=msgspec.structs.replace(udp.overlay, net_conf=conf))
        for config, links in ((udp, {"flannel0"}), (vxlan, {"flannel.1", "flannel-v6.1"}), (udp, {"flannel0"})):
            a.agent.config = config
            start([a])
            found = {word for word in netns.run(a.space, ["ls", "/proc/sys/net/ipv4/conf"]).split() if "flannel" in word}
            found -= {"flannel0-in", "flannel0-out"} if config is udp and overlay is KERNEL else set()
            assert (found, len(running_forwarders(tmp_path / "n1"))) == (links, int(config is udp))
            a.agent.kill()


def _started(nodes: list[UdpNode]) -> list[UdpNode]:
    start(nodes)
    return nodes


def nodes_peers(number: int) -> tuple[TunnelPeer, ...]:
    """Return what the other of two nodes should know of one."""
    return (
        TunnelPeer(Prefix.parse(f"10.244.{number}.0/24"), ip_address(f"192.168.1.{number}")),
        TunnelPeer(Prefix.parse(f"fd00:244:0:{number}::/64"), ip_address(f"fd00:1::{number}")),
    )


def running_forwarders(directory: Path) -> list[int]:
    """Return every process whose control socket lies in a directory."""
    found = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    return sorted(pid for pid in found if str(directory / "forwarder.sock") in processes.command_line(pid))
