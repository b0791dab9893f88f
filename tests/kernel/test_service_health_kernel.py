"""Health check ports on real sockets: who answers what, that nobody can hold them up, and that there can be thousands."""

import resource
import socket
import threading
from http.client import HTTPConnection

import pytest
from service_node import eventually

from nodeplane import http_ports
from nodeplane.health import HealthServers
from proxy.health import HealthEndpoint

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("in_netns")]

EVERYWHERE = {4: ("0.0.0.0",), 6: ("::",)}
TIMEOUT = 5


@pytest.fixture
def servers():
    """Yield servers of a healthy node; ``servers.node.healthy = False`` makes it another."""
    node = Node()
    made = HealthServers(lambda: node.healthy)
    made.node = node
    yield made
    made.close()


class Node:
    """What the servers know of the node."""

    healthy = True


def endpoints(**services):
    """Return health endpoints: name=(port, local IPv4 endpoints[, local IPv6 endpoints])."""
    found = {}
    for name, (port, *ready) in services.items():
        families = zip((4, 6), ready, strict=False)
        found["ns", name] = tuple(HealthEndpoint(("ns", name), family, port, count) for family, count in families)
    return found


def ask(port, host="127.0.0.1", method="GET", path="/healthz"):
    """Return (status, weight, body) of a fresh connection."""
    connection = HTTPConnection(host, port, timeout=TIMEOUT)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.headers["X-Load-Balancing-Endpoint-Weight"], response.read()
    finally:
        connection.close()


def refuses(port, host="127.0.0.1"):
    try:
        socket.create_connection((host, port), timeout=TIMEOUT).close()
    except ConnectionRefusedError:
        return True
    return False


def test_each_service_and_family_for_itself(servers):
    """Every path and method is answered, with the Service's own count in the family that was asked; HEAD has no body."""
    assert servers.set(endpoints(web=(32000, 2, 0), dns=(32001, 0)), EVERYWHERE) == []
    for method, path in (("GET", "/"), ("GET", "/any/path?x=1"), ("POST", "/"), ("DELETE", "/")):
        status, weight, body = ask(32000, method=method, path=path)
        assert (status, weight) == (200, "2")
        assert body.startswith(b'{\n\t"service": {\n\t\t"namespace": "ns",\n\t\t"name": "web"\n\t},\n\t"localEndpoints": 2,')
    assert ask(32000, method="HEAD") == (200, "2", b"")
    assert ask(32000, host="::1")[:2] == (503, "0")
    assert ask(32001)[:2] == (503, "0")
    assert refuses(32001, "::1")


def test_changes_are_answered_at_once(servers):
    """Endpoints that come, a proxy that fails and a Service that goes are seen at the next request, on an open connection too."""
    servers.set(endpoints(web=(32000, 0)), EVERYWHERE)
    connection = HTTPConnection("127.0.0.1", 32000, timeout=TIMEOUT)

    def asked():
        connection.request("GET", "/")
        response = connection.getresponse()
        response.read()
        return response.status

    assert asked() == 503
    used = connection.sock
    servers.set(endpoints(web=(32000, 1)), EVERYWHERE)
    assert asked() == 200
    servers.node.healthy = False
    assert asked() == 503
    assert connection.sock is used
    servers.set({}, EVERYWHERE)
    with pytest.raises(ConnectionError):
        asked()
    connection.close()
    assert refuses(32000)


def test_port_that_is_taken(servers):
    """A port that somebody holds is an error that names Service, port and reason, and is opened once it is free; others work."""
    with socket.create_server(("0.0.0.0", 32000)):
        wanted = endpoints(web=(32000, 1), dns=(32001, 1))
        line = "Service ns/web: healthCheckNodePort 32000: listen on 0.0.0.0: Address already in use"
        assert servers.set(wanted, EVERYWHERE) == [line]
        assert servers.set(wanted, EVERYWHERE) == [line]
        assert ask(32001)[0] == 200
    assert servers.set(wanted, EVERYWHERE) == []
    assert ask(32000)[0] == 200


def test_port_passes_to_another_service(servers):
    """Two Services with one port: the first has it and the other is told; the port passes on when the first goes."""
    assert servers.set(endpoints(a=(32000, 1), b=(32000, 2)), EVERYWHERE) == [
        "Service ns/b: healthCheckNodePort 32000: listen on 0.0.0.0: Address already in use"
    ]
    assert ask(32000)[1] == "1"
    assert servers.set(endpoints(b=(32000, 2)), EVERYWHERE) == []
    assert ask(32000)[1] == "2"


def test_only_at_its_places(servers):
    """Where NodePorts answer on one address alone, so do health checks."""
    servers.set(endpoints(web=(32000, 1)), {4: ("127.0.0.2",)})
    assert ask(32000, host="127.0.0.2")[0] == 200
    assert refuses(32000)


def test_slow_clients_hold_nobody(servers, monkeypatch):
    """More clients that say nothing than there is room for, and some that stop half-way, keep nobody waiting; all are let go."""
    monkeypatch.setattr(http_ports, "CLIENTS", 20)
    monkeypatch.setattr(http_ports, "TIMEOUT", 0.5)
    servers.set(endpoints(web=(32000, 1)), EVERYWHERE)
    silent = [socket.create_connection(("127.0.0.1", 32000), timeout=TIMEOUT) for _ in range(30)]
    try:
        for one in silent[20:]:
            one.sendall(b"GET / HT")
        assert ask(32000)[0] == 200
        assert [one.recv(1) for one in silent[20:]] == [b""] * 10
        assert ask(32000)[0] == 200
    finally:
        for one in silent:
            one.close()


def test_endless_request(servers):
    """A request whose head does not end is cut off at its largest size."""
    servers.set(endpoints(web=(32000, 1)), EVERYWHERE)
    with socket.create_connection(("127.0.0.1", 32000), timeout=TIMEOUT) as client, pytest.raises(ConnectionError):
        client.sendall(b"x" * 10_000_000)


def test_requests_in_one_packet(servers):
    """Requests that arrive together, and one that arrives in pieces, are each answered."""
    servers.set(endpoints(web=(32000, 1)), EVERYWHERE)
    with socket.create_connection(("127.0.0.1", 32000), timeout=TIMEOUT) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\nConnec")
        client.sendall(b"tion: close\r\n\r\n")
        heard = b""
        while data := client.recv(4096):
            heard += data
    assert heard.count(b"HTTP/1.1 200 OK\r\n") == 2
    assert heard.count(b"Connection: close\r\n") == 1


def test_thousands_of_ports(servers):
    """3,000 Services in two families are opened, each answers for itself, by one thread; they close again."""
    before = threading.active_count()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        wanted = endpoints(**{f"s{i}": (20000 + i, i, i + 1) for i in range(3000)})
        assert servers.set(wanted, EVERYWHERE) == []
        assert threading.active_count() == before + 1
        for i in (0, 1, 1499, 2999):
            assert ask(20000 + i)[1] == str(i)
            assert ask(20000 + i, host="::1")[1] == str(i + 1)
        servers.set({}, EVERYWHERE)
        assert refuses(20000)
    finally:
        eventually(lambda: servers.ports._clients == {})
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
