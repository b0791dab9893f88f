"""The rules of ``masquerade.py`` as tables of nftables, for ``EnableNFTables``: flannel's names and hooks, and its iptables order.

    table ip flannel-ipv4
      postrtg  nat postrouting 100       whose source address is hidden, rule for rule as in masquerade.py
      forward  filter forward 0          pod packets are accepted here; a drop elsewhere still drops them

flannel itself writes the fourth rule as ``saddr != POD daddr CL``, which also exempts what its last rule is for, and compares the
whole mark instead of its bit; here both are as in its iptables rules.
Source: flannel pkg/trafficmngr/nftables/nftables.go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kernelstate.objects.address import Family, Prefix
from kernelstate.objects.nftables import (
    AcceptPacket,
    AddressIs,
    Chain,
    Hook,
    MarkIs,
    MasqueradeFully,
    Match,
    ReturnToCaller,
    Rule,
    Table,
)
from overlay.render.masquerade import MASQUERADE_MARK, MULTICAST
from overlay.table import PeerTable

NAMES: Mapping[Family, str] = {4: "flannel-ipv4", 6: "flannel-ipv6"}
FORWARD, POSTRTG = "forward", "postrtg"


def render_masquerade_tables(
    table: PeerTable,
    *,
    ip_masq: bool,
    forward_rules: bool = True,
    random_fully: bool = True,
    never_masquerade: Sequence[Prefix] = (),
) -> dict[Family, Table]:
    """Return a table for every family in which the node has an end and a rule is wanted."""
    tables: dict[Family, Table] = {}
    for way in table.own:
        family: Family = 4 if way.family == 4 else 6
        network = table.net_conf.network_of(family)
        assert network is not None
        cluster, own = Prefix.of(network), Prefix.of(way.pod_cidr)
        chains: dict[str, Chain] = {}
        if forward_rules:
            rules = tuple(Rule((AddressIs(side, (cluster,)),), (AcceptPacket(),)) for side in ("saddr", "daddr"))
            chains[FORWARD] = Chain(rules, Hook("filter", "forward", 0))
        if ip_masq:
            exempt = [prefix for prefix in never_masquerade if prefix.family == family]
            chains[POSTRTG] = Chain(
                _masquerade_rules(cluster, own, exempt, random_fully=random_fully), Hook("nat", "postrouting", 100)
            )
        if chains:
            tables[family] = Table(chains, {}, {})
    return tables


def _masquerade_rules(cluster: Prefix, own: Prefix, exempt: Sequence[Prefix], *, random_fully: bool) -> tuple[Rule, ...]:
    masquerade, leave = (MasqueradeFully(random_fully),), (ReturnToCaller(),)
    from_cluster, to_cluster = _source(cluster), _destination(cluster)
    strangers, to_own = _source(cluster, negated=True), _destination(own)
    multicast = AddressIs("daddr", (MULTICAST[cluster.family],), negated=True)
    return (
        Rule((MarkIs(MASQUERADE_MARK),), leave),
        Rule((_source(own), to_cluster), leave),
        Rule((from_cluster, to_own), leave),
        Rule((strangers, to_own), leave),
        *(Rule((from_cluster, _destination(prefix)), leave) for prefix in exempt),
        Rule((from_cluster, multicast), masquerade),
        Rule((strangers, to_cluster), masquerade),
    )


def _source(prefix: Prefix, *, negated: bool = False) -> Match:
    return AddressIs("saddr", (prefix,), negated)


def _destination(prefix: Prefix, *, negated: bool = False) -> Match:
    return AddressIs("daddr", (prefix,), negated)
