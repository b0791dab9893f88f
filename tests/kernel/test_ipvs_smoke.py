"""IPVS of this kernel, by its own tool and without our code: what every other test of IPVS takes for granted.

client 10.9.1.2 ----- 10.9.1.1  node  10.9.2.1 ----- 10.9.2.2  pod, answers on ports 8001 and 8002
10.96.0.9 on a dummy link
"""

import socket
import threading

import pytest

from kernelstate.linux import netns as namespaces

pytestmark = [pytest.mark.kernel, pytest.mark.ipvs]

NODE = """\
link add dummy0 type dummy
addr add 10.96.0.9/32 dev dummy0
link add client type veth peer name eth0 netns {client}
link add pod type veth peer name eth0 netns {pod}
addr add 10.9.1.1/24 dev client
addr add 10.9.2.1/24 dev pod
link set client up
link set pod up
"""
SERVERS = """\
-A -t 10.96.0.9:80 -s rr
-a -t 10.96.0.9:80 -r 10.9.2.2:8001 -m -w 1
-a -t 10.96.0.9:80 -r 10.9.2.2:8002 -m -w 1
"""


def leaf(network: int) -> str:
    return f"link set eth0 up\naddr add 10.9.{network}.2/24 dev eth0\nroute add default via 10.9.{network}.1"


def listening(port: int) -> socket.socket:
    """Answer two connections with the port's number."""
    server = socket.create_server(("10.9.2.2", port))
    server.settimeout(30)

    def answer():
        for _ in range(2):
            connection, _ = server.accept()
            with connection:
                connection.sendall(str(port).encode())

    threading.Thread(target=answer, daemon=True).start()
    return server


def asked() -> bytes:
    with socket.create_connection(("10.96.0.9", 80), timeout=30) as connection:
        return connection.recv(16)


def test_round_robin_over_two_real_servers(make_netns):
    """A virtual server on a dummy link's address hands connections to its real servers in turn, and counts what is under way."""
    node, client, pod = make_netns(), make_netns(), make_netns()
    namespaces.run(node, ["ip", "-batch", "-"], stdin=NODE.format(client=client, pod=pod))
    namespaces.run(client, ["ip", "-batch", "-"], stdin=leaf(1))
    namespaces.run(pod, ["ip", "-batch", "-"], stdin=leaf(2))
    namespaces.run(node, ["sysctl", "-qw", "net.ipv4.ip_forward=1"])
    namespaces.run(node, ["ipvsadm", "-R"], stdin=SERVERS)
    with namespaces.call(pod, lambda: listening(8001)), namespaces.call(pod, lambda: listening(8002)):
        answers = namespaces.call(client, lambda: [asked() for _ in range(4)])
    assert answers in ([b"8001", b"8002"] * 2, [b"8002", b"8001"] * 2)
    rows = [line.split() for line in namespaces.run(node, ["ipvsadm", "-Ln"]).splitlines()]
    # A row ends with weight, active and inactive connections. (Its --stats are brought up to date every two seconds only.)
    connections = {row[1]: int(row[4]) + int(row[5]) for row in rows if row[0] == "->" and row[1].startswith("10.9.2.2")}
    assert connections == {"10.9.2.2:8001": 2, "10.9.2.2:8002": 2}
