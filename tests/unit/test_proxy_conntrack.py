"""Stale flows are found on every way a backend can go, at once or after a time, and nothing else is touched."""

from ipaddress import ip_address

import pytest

from kernelstate.objects.address import Prefix
from kernelstate.ports import ConntrackEntry
from proxy.conntrack import Departures, StaleFlows
from proxy.table import Backend, Frontend, Kind, PortName, ServiceEntry

NODE_IP = "192.168.1.1"
LOCAL = frozenset({Prefix.parse(NODE_IP + "/32")})


def number(ip):
    return int(ip_address(ip))


def dns(*pods, protocol="UDP"):
    """Make the entry of a DNS Service with a ClusterIP and a NodePort."""
    backends = tuple(Backend(f"{p}:53", ip_address(p), 53) for p in pods)
    return ServiceEntry(
        PortName("kube-system", "dns", "dns", protocol),
        4,
        (Frontend(Kind.CLUSTER_IP, ip_address("10.96.0.10"), 53), Frontend(Kind.NODE_PORT, None, 30053)),
        cluster=backends,
        has_any=bool(backends),
        serving=backends,
    )


def flow(destination, port, reply_source, reply_port=53):
    """Make a tracked UDP flow."""
    return ConntrackEntry(4, "udp", number("10.244.1.5"), number(destination), 40000, port, number(reply_source), reply_port)


VIA_CLUSTER_IP = flow("10.96.0.10", 53, "10.244.2.7")
VIA_NODE_PORT = flow(NODE_IP, 30053, "10.244.2.7")
VIA_LOCALHOST = flow("127.0.0.1", 30053, "10.244.2.7")
SOMEWHERE_ELSE = flow("198.51.100.9", 30053, "198.51.100.9", 30053)
NEVER_TRANSLATED = flow("10.96.0.10", 53, "10.96.0.10")
TO_THE_OTHER_POD = flow("10.96.0.10", 53, "10.244.2.8")
EVERYTHING = [VIA_CLUSTER_IP, VIA_NODE_PORT, VIA_LOCALHOST, SOMEWHERE_ELSE, NEVER_TRANSLATED, TO_THE_OTHER_POD]
GONE = [VIA_CLUSTER_IP, VIA_NODE_PORT, VIA_LOCALHOST]


@pytest.mark.parametrize(
    ("before", "after", "stale"),
    [
        ([dns("10.244.2.7", "10.244.2.8")], [dns("10.244.2.8")], [*GONE, NEVER_TRANSLATED]),
        ([dns("10.244.2.7")], [dns()], [*GONE, NEVER_TRANSLATED, TO_THE_OTHER_POD]),
        ([dns("10.244.2.7")], [], [*GONE, NEVER_TRANSLATED, TO_THE_OTHER_POD]),
        ([], [dns("10.244.2.7", "10.244.2.8")], [NEVER_TRANSLATED]),
        ([dns()], [dns("10.244.2.7", "10.244.2.8")], [NEVER_TRANSLATED]),
        ([dns("10.244.2.7")], [dns("10.244.2.7", "10.244.2.8")], []),
        ([dns("10.244.2.7", protocol="TCP")], [], []),
    ],
    ids=[
        "one of two goes",
        "the last one goes",
        "the Service goes",
        "the Service comes",
        "the first one comes",
        "one more comes",
        "TCP is left alone",
    ],
)
def test_stale(before, after, stale):
    """Flows to a frontend whose answerer no longer serves are stale; a flow to another host's port 30053 never is."""
    flows = StaleFlows()
    flows.note(before, after)
    assert flows.select(EVERYTHING, LOCAL) == stale


def test_after_a_restart_only_dead_flows_go():
    """A restarted agent compares the kernel's flows with what serves now, and spares those that are alive."""
    flows = StaleFlows()
    flows.note_all({("kube-system", "dns"): (dns("10.244.2.7"),)})
    assert flows.select(EVERYTHING, LOCAL) == [NEVER_TRANSLATED, TO_THE_OTHER_POD]


def test_later_change_wins():
    """A backend that comes back before the flush keeps its flows."""
    first, second = StaleFlows(), StaleFlows()
    first.note([dns("10.244.2.7")], [dns()])
    second.note([dns()], [dns("10.244.2.7")])
    first.merge(second)
    assert first.select([VIA_CLUSTER_IP], LOCAL) == []


# -- connections -----------------------------------------------------------------------------------------------------

ALL = frozenset({"TCP", "UDP", "SCTP"})
A, B, C = "10.244.2.7", "10.244.2.8", "10.244.2.9"


def connection(answerer, destination="10.96.0.10", port=53, stage="open", protocol="tcp"):
    """Make a tracked connection to the Service that is answered by a pod."""
    return ConntrackEntry(
        4, protocol, number("10.244.1.5"), number(destination), 40000, port, number(answerer), 53, stage=stage
    )


def change(before, after, protocol="TCP"):
    """Return what is noted when the Service's endpoints change; None is no Service."""
    stale = StaleFlows(ALL)
    entries = [[] if pods is None else [dns(*pods, protocol=protocol)] for pods in (before, after)]
    stale.note(*entries)
    return stale


def due(departures, now, *tracked):
    """Return the pods whose connections are due."""
    flows = tracked or [connection(pod) for pod in (A, B, C)]
    return [str(ip_address(f.reply_source)) for f in departures.select(flows, LOCAL, now)]


@pytest.mark.parametrize("protocol", ["TCP", "SCTP"])
def test_connections_are_due_after_their_time(protocol):
    """Each backend's connections are due a while after it went; those of one that serves, or came back, or is unknown are not."""
    flows = [connection(pod, protocol=protocol.lower()) for pod in (A, B, C)]
    departures = Departures(30)
    assert departures.next_due is None
    departures.take(change([A, B, C], [B, C], protocol), now=100)
    departures.take(change([B, C], [C], protocol), now=110)
    assert departures.next_due == 130
    assert due(departures, 129, *flows) == []
    assert departures.kinds(129) == []
    assert departures.kinds(130) == [(4, protocol.lower())]
    assert due(departures, 130, *flows) == [A]
    departures.done(130)
    assert departures.next_due == 140
    departures.take(change([C], [B, C], protocol), now=135)
    assert departures.next_due is None
    assert due(departures, 200, *flows) == []


def test_who_goes_again_goes_later():
    """A backend that comes back and goes again has its time anew."""
    departures = Departures(30)
    departures.take(change([A, B], [B]), now=100)
    departures.take(change([B], [A, B]), now=110)
    departures.take(change([A, B], [B]), now=120)
    assert due(departures, 149) == []
    assert due(departures, 150) == [A]


@pytest.mark.parametrize("after", [[], None], ids=["no endpoint", "no Service"])
def test_connections_of_a_service_that_goes(after):
    """Where the last endpoint goes, or the Service itself, the connections to its backends are due."""
    departures = Departures(0)
    departures.take(change([A, B], after), now=100)
    assert due(departures, 100) == [A, B]


def test_connections_that_are_never_due():
    """What is over, what never was translated, and what goes to the same port elsewhere is left alone; a NodePort is not."""
    departures = Departures(0)
    departures.take(change([A], []), now=100)
    spared = [
        connection(A, stage="over"),
        connection("10.96.0.10"),
        connection(A, "198.51.100.9", 30053),
        connection(A, protocol="sctp"),
    ]
    assert departures.select(spared, LOCAL, 100) == []
    assert due(departures, 100, connection(A, NODE_IP, 30053), connection(A, stage="opening")) == [A, A]


def test_after_a_restart_whoever_does_not_serve_went_then():
    """A restarted agent takes all who do not serve as gone since it started, and forgets that once it is done."""
    stale = StaleFlows(ALL)
    stale.note_all({("kube-system", "dns"): (dns(A, protocol="TCP"),)})
    departures = Departures(30)
    departures.take(stale, now=100)
    assert due(departures, 129) == []
    assert due(departures, 130) == [B, C]
    departures.done(130)
    assert (departures.next_due, due(departures, 1000)) == (None, [])


def test_merged_changes_of_connections():
    """Two changes taken in as one lead to the same as one after the other."""
    first, second = change([A, B, C], [C]), change([C], [B])
    first.merge(second)
    departures = Departures(0)
    departures.take(first, now=100)
    assert due(departures, 100) == [A, C]


def test_connections_are_not_looked_at_unless_asked():
    """By default a change of a TCP Service is not even noted."""
    stale = StaleFlows()
    stale.note([dns(A, protocol="TCP")], [])
    departures = Departures(0)
    departures.take(stale, now=100)
    assert (bool(stale), departures.next_due) == (False, None)
