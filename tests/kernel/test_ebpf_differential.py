"""What the kernel's programs tell real sockets is what the oracle says, for random clusters, settings and questions.

    node  10.244.0.0/16 and fd00:244::/48 are local, listened on everywhere; nothing else is routed
    pod   the same

So a socket that was led to an endpoint meets a listener that says which address was meant, and one that was left goes nowhere.
"""

import contextlib
import errno
import socket
import struct

import msgspec
import pytest
from asking import ask, own_cgroup
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from service_worlds import LOCAL_ADDRESSES, NODE, asked_by_sockets, snapshots
from service_worlds import settings as proxy_settings

from kernelstate.linux import netns as namespaces
from kernelstate.linux.ebpf_services import LinuxServiceMaps
from kernelstate.reconcile_ebpf import SocketReconciler
from nodeplane.host_kernel import BUILT
from proxy.compile import compile_table
from proxy.modes import TRAITS
from proxy.oracle import Oracle
from proxy.render.ebpf_program import render_ebpf

pytestmark = pytest.mark.kernel

PORTS = (8080, 8081)
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


@st.composite
def worlds(draw, family):
    """Draw a cluster, settings, and what sockets ask for."""
    snapshot = draw(snapshots(families=(4, 6), least=2))
    config = msgspec.structs.replace(draw(proxy_settings()), guard_node_ports=draw(st.booleans()))
    flows = draw(st.lists(asked_by_sockets(snapshot, family), min_size=30, max_size=40))
    return snapshot, config, [f for f in flows if f.by_socket and f.protocol in {"TCP", "UDP"}]


def answers(flows):
    """Ask for each flow from this process; return the endpoint reached, ``reject``, or ``left``, flow by flow."""
    with contextlib.ExitStack() as undo:
        listening = {}
        for port in PORTS:
            listening["TCP", port] = undo.enter_context(_open(6, socket.SOCK_STREAM))
            listening["UDP", port] = undo.enter_context(_open(6, socket.SOCK_DGRAM))
            for protocol in ("TCP", "UDP"):
                listening[protocol, port].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
                listening[protocol, port].bind(("::", port))
            listening["TCP", port].listen(256)
        return [_answer(flow, listening) for flow in flows]


def _open(family, kind):
    found = socket.socket(FAMILIES[family], kind)
    found.settimeout(2)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if kind == socket.SOCK_STREAM:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves no TIME_WAIT behind
    return found


def _answer(flow, listening):
    kind = socket.SOCK_STREAM if flow.protocol == "TCP" else socket.SOCK_DGRAM
    to = (str(flow.destination), flow.port)
    with _open(flow.destination.version, kind) as client:
        try:
            if flow.protocol == "TCP":
                client.connect(to)
            else:
                client.sendto(b"?", to)
        except OSError as error:
            return "reject" if error.errno == errno.ECONNREFUSED else "left"
        for port in PORTS:
            server = listening[flow.protocol, port]
            server.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                return _reached(flow, client, server, port)
    return "left"


def _reached(flow, client, server, port):
    """Take what came in, and check that the client believes to speak to whom it asked for."""
    if flow.protocol == "TCP":
        accepted, _ = server.accept()
        with accepted:
            address = accepted.getsockname()[0]
            assert client.getpeername()[:2] == (str(flow.destination), flow.port)
    else:
        _, ancillary, _, _ = server.recvmsg(64, 256)
        packed = next(data for level, kind, data in ancillary if kind == socket.IPV6_PKTINFO)
        address = socket.inet_ntop(socket.AF_INET6, struct.unpack("16sI", packed)[0])
    plain = address.removeprefix("::ffff:")
    return f"[{plain}]:{port}" if ":" in plain else f"{plain}:{port}"


def expected(oracle, flow):
    """Return what may be seen."""
    found = oracle._ask_socket(flow, [])
    seen = {"left"} if found is None else {o.backend or o.verdict for o in found}
    return seen | {"left", "reject"} if flow.destination.is_loopback and not any(":" in s for s in seen) else seen


@pytest.mark.parametrize("family", [4, 6])
def test_sockets_meet_oracle(make_netns, family):
    """Each socket of the node and of a pod ends where the oracle says, and is told so by getpeername."""
    node, pod = make_netns(), make_netns()
    for space in (node, pod):
        namespaces.run(space, ["ip", "route", "add", "local", "10.244.0.0/16", "dev", "lo"])
        namespaces.run(space, ["ip", "-6", "route", "add", "local", "fd00:244::/48", "dev", "lo"])
    with own_cgroup() as cgroup:
        with namespaces.inside(node):
            port = LinuxServiceMaps(BUILT, cgroup)
        reconciler = SocketReconciler(port, lambda: 0.0)

        @seed(20)
        @hypothesis_settings(
            max_examples=50,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # shrinking would go through the kernel for minutes
            suppress_health_check=list(HealthCheck),
        )
        @given(worlds(family))
        def check(world):
            snapshot, config, asked = world
            table = compile_table(snapshot, NODE)
            reconciler.set_desired(render_ebpf(table, config, NODE))
            report = reconciler.sync()
            assert report.ok, report.errors
            oracle = Oracle(table, config, NODE, LOCAL_ADDRESSES, TRAITS["ebpf"])
            for space, from_node in ((node, True), (pod, False)):
                own = [flow for flow in asked if flow.from_node == from_node]
                for flow, seen in zip(own, ask(cgroup, space, answers, own), strict=True):
                    assert seen in expected(oracle, flow), flow

        try:
            check()
            assert port.counters()["translated"] > 15
        finally:
            port.close()
