"""Session affinity in a real kernel: a client stays for as long as was said, counted from its last new connection, no longer."""

import socket
import threading
import time

import pytest
from programmed_node import ProgrammedNode, service
from service_node import ServiceNode, pod_ip

from kernelstate.linux import netns

pytestmark = pytest.mark.kernel

CLIENTS = [f"10.244.3.{10 + n}" for n in range(24)]
"""Enough that all of them choose the same of two pods again by chance once in sixteen million runs."""
STAY = 3
"""Seconds. Longer than what a test takes between two connections of one client, also on a busy machine."""
VIP = ("10.96.0.10", 80)


@pytest.fixture
def rig(make_netns):
    """Yield two pods that answer with their number, and a third with many addresses."""
    made = ServiceNode(make_netns, pods=3)
    netns.run(made.pods[3], ["ip", "-batch", "-"], stdin="\n".join(f"addr add {a}/24 dev eth0" for a in CLIENTS))
    for pod in (1, 2):
        threading.Thread(target=answer, args=(made.listen(pod, 8080), pod), daemon=True).start()
    yield made
    made.close()


def answer(server, pod):
    """Tell everybody the pod's number."""
    server.settimeout(60)
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            connection.sendall(b"%d" % pod)


def ask(rig):
    """Let every client connect once; return which pod each met."""
    met = {}
    with netns.inside(rig.pods[3]):
        for client in CLIENTS:
            with socket.create_connection(VIP, timeout=10, source_address=(client, 0)) as connection:
                met[client] = int(connection.recv(8))
    return met


def stays(rig, mode, seconds):
    """Check that clients stay while they come back in time, and are free once they did not."""
    node = ProgrammedNode(rig, mode)
    try:
        web = service(VIP[0], {"TCP": VIP[1]}, affinity=seconds)
        node.program((web, [pod_ip(1), pod_ip(2)]))
        first = ask(rig)
        assert set(first.values()) == {1, 2}
        end = time.monotonic() + 1.5 * seconds
        while time.monotonic() < end:  # each connection starts the time again: together they are longer than it
            assert ask(rig) == first
            time.sleep(seconds / 6)  # the pace at which clients come back
        quiet = time.monotonic() + seconds + 1.2  # xt_recent counts in whole seconds
        while time.monotonic() < quiet:
            time.sleep(0.1)  # what is tested is that time passes
        assert ask(rig) != first
    finally:
        node.close()


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_a_client_stays_as_long_as_was_said(rig, mode):
    """Within the timeout of its last new connection a client meets the same pod, after it any."""
    stays(rig, mode, STAY)


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_who_was_with_a_pod_that_went_is_free(rig, mode):
    """A client of an endpoint that went is sent to another at once; the others stay where they are."""
    node = ProgrammedNode(rig, mode)
    try:
        web = service(VIP[0], {"TCP": VIP[1]}, affinity=600)
        node.program((web, [pod_ip(1), pod_ip(2)]))
        first = ask(rig)
        node.program((web, [pod_ip(2)]))
        assert set(ask(rig).values()) == {2}
        node.program((web, [pod_ip(1), pod_ip(2)]))
        later = ask(rig)
        assert set(later.values()) == {2}, "whoever met pod 2 last stays with it"
        assert set(first.values()) == {1, 2}
    finally:
        node.close()
