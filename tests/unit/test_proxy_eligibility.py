"""Which endpoints end up in which pool: one row, one rule of Kubernetes."""

from ipaddress import ip_address

import pytest

from clusterstate.objects import Endpoint
from proxy.eligibility import Candidate, Eligible, eligible_backends
from proxy.table import Backend


def endpoint(letter, state="ready", *, local=False, zones=(), nodes=()):
    """Make a candidate named by a letter; ``state`` is ready, not-ready, terminating (serving) or gone (not serving)."""
    address = ip_address(f"10.0.0.{ord(letter) - 96}")
    ready, serving, terminating = {
        "ready": (True, True, False),
        "not-ready": (False, False, False),
        "terminating": (False, True, True),
        "gone": (False, False, True),
    }[state]
    made = Endpoint(address, ready, serving, terminating, zone_hints=frozenset(zones), node_hints=frozenset(nodes))
    return Candidate(Backend(f"{letter}:80", address, 80, local), made)


def pools(result: Eligible):
    """Return a pool's letters, for short."""
    return "".join(b.name[0] for b in result.cluster), "".join(b.name[0] for b in result.local), result.has_any


ROWS = {
    "ready ones serve": ([endpoint("a"), endpoint("b", "not-ready")], "a", "", True),
    "local pool holds only local ones": ([endpoint("a", local=True), endpoint("b")], "ab", "a", True),
    "no endpoint": ([], "", "", False),
    "only unready ones": ([endpoint("a", "not-ready")], "", "", False),
    "terminating ones stand in when nobody is ready": (
        [endpoint("a", "terminating"), endpoint("b", "terminating", local=True), endpoint("c", "gone")],
        "ab",
        "b",
        True,
    ),
    "terminating ones wait while somebody is ready": ([endpoint("a"), endpoint("b", "terminating")], "a", "", True),
    "a terminating local one stands in although others are ready elsewhere": (
        [endpoint("a"), endpoint("b", "terminating", local=True)],
        "a",
        "b",
        True,
    ),
    "zone hints choose the zone": ([endpoint("a", zones=["z1"]), endpoint("b", zones=["z2"])], "a", "", True),
    "one endpoint without hints turns them off": ([endpoint("a", zones=["z2"]), endpoint("b")], "ab", "", True),
    "hints for another zone only turn them off": (
        [endpoint("a", zones=["z2"]), endpoint("b", zones=["z3"])],
        "ab",
        "",
        True,
    ),
    "node hints beat zone hints": (
        [endpoint("a", zones=["z1"], nodes=["n2"]), endpoint("b", zones=["z2"], nodes=["n1"])],
        "b",
        "",
        True,
    ),
    "node hints for others fall back to the zone": (
        [endpoint("a", zones=["z1"], nodes=["n2"]), endpoint("b", zones=["z2"], nodes=["n3"])],
        "a",
        "",
        True,
    ),
    "topology never narrows the local pool": (
        [endpoint("a", zones=["z2"], local=True), endpoint("b", zones=["z1"])],
        "b",
        "a",
        True,
    ),
    "hints of unready endpoints do not count": (
        [endpoint("a", zones=["z1"]), endpoint("b", "not-ready")],
        "a",
        "",
        True,
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_pools(row):
    """Each row of the table."""
    candidates, cluster, local, has_any = ROWS[row]
    result = eligible_backends(candidates, node="n1", zone="z1", uses_cluster=True, uses_local=True)
    assert pools(result) == (cluster, local, has_any)


def test_unused_pools_are_empty():
    """A pool that no frontend uses is not computed; whether anybody exists is."""
    candidates = [endpoint("a", local=True)]
    assert pools(eligible_backends(candidates, node="n1", zone="", uses_cluster=True, uses_local=False)) == ("a", "", True)
    assert pools(eligible_backends(candidates, node="n1", zone="", uses_cluster=False, uses_local=True)) == ("", "a", True)


def test_node_without_zone_ignores_zone_hints():
    """A node that has no zone label sees every endpoint."""
    candidates = [endpoint("a", zones=["z1"]), endpoint("b", zones=["z2"])]
    assert pools(eligible_backends(candidates, node="n1", zone="", uses_cluster=True, uses_local=False)) == ("ab", "", True)
