"""flannel's rules beside the tunnel: whose source address is hidden when packets leave, and that pod packets are forwarded.

    nat POSTROUTING --> FLANNEL-POSTRTG      POD is this node's pod network, CL the cluster's
        mark 0x4000/0x4000      RETURN       kube-proxy's KUBE-POSTROUTING masquerades these
        -s POD -d CL            RETURN       pod to pod: addresses stay
        -s CL -d POD            RETURN
        ! -s CL -d POD          RETURN       from outside to a pod here: likewise
        -s CL -d EXEMPT         RETURN       ours: networks outside that are to see pod addresses
        -s CL ! -d multicast    MASQUERADE   pods to the world
        ! -s CL -d CL           MASQUERADE   the world to pods elsewhere: the answer must come back through here
    filter FORWARD --> FLANNEL-FWD:  -s CL ACCEPT, -d CL ACCEPT

Chains, order and comments are flannel's, so that both can run on one cluster and habits carry over.
Source: flannel pkg/trafficmngr/iptables/iptables.go.
"""

from __future__ import annotations

from collections.abc import Sequence

from kernelstate.objects.address import Family, Prefix
from kernelstate.objects.netfilter import Anchor, ChainKey, Comment, Jump, Mark, Masquerade, Rule, Ruleset, Verdict
from overlay.table import PeerTable

POSTRTG, FWD = "FLANNEL-POSTRTG", "FLANNEL-FWD"
CHAIN_NAMES = (POSTRTG, FWD)
"""Names by which the overlay's chains are known as ours."""
MASQUERADE_MARK = 0x4000
MULTICAST: dict[int, Prefix] = {4: Prefix.parse("224.0.0.0/4"), 6: Prefix.parse("ff00::/8")}

_MASQ = Comment("flanneld masq")
_FORWARD = Comment("flanneld forward")


def render_masquerade(
    table: PeerTable,
    *,
    ip_masq: bool,
    forward_rules: bool = True,
    random_fully: bool = True,
    never_masquerade: Sequence[Prefix] = (),
) -> Ruleset:
    """Return chains and their anchors, which go to the end of their chains, for every family in which the node has an end."""
    chains: dict[ChainKey, tuple[Rule, ...]] = {}
    anchors: list[Anchor] = []
    for way in table.own:
        family: Family = 4 if way.family == 4 else 6
        network = table.net_conf.network_of(family)
        assert network is not None
        cluster, own = Prefix.of(network), Prefix.of(way.pod_cidr)
        if ip_masq:
            exempt = [prefix for prefix in never_masquerade if prefix.family == family]
            chains[ChainKey(family, "nat", POSTRTG)] = _masquerade_rules(cluster, own, exempt, random_fully=random_fully)
            jump = Rule(Jump(POSTRTG), (_MASQ,))
            anchors.append(Anchor(ChainKey(family, "nat", "POSTROUTING"), jump, first=False))
        if forward_rules:
            chains[ChainKey(family, "filter", FWD)] = (
                Rule(Verdict.ACCEPT, (_FORWARD,), source=cluster),
                Rule(Verdict.ACCEPT, (_FORWARD,), destination=cluster),
            )
            jump = Rule(Jump(FWD), (_FORWARD,))
            anchors.append(Anchor(ChainKey(family, "filter", "FORWARD"), jump, first=False))
    return Ruleset(chains, tuple(anchors))


def _masquerade_rules(cluster: Prefix, own: Prefix, exempt: Sequence[Prefix], *, random_fully: bool) -> tuple[Rule, ...]:
    masquerade = Masquerade(random_fully)
    comment = (_MASQ,)
    return (
        Rule(Verdict.RETURN, (Mark(MASQUERADE_MARK, MASQUERADE_MARK), _MASQ)),
        Rule(Verdict.RETURN, comment, source=own, destination=cluster),
        Rule(Verdict.RETURN, comment, source=cluster, destination=own),
        Rule(Verdict.RETURN, comment, source=cluster, destination=own, source_negated=True),
        *(Rule(Verdict.RETURN, comment, source=cluster, destination=prefix) for prefix in exempt),
        Rule(masquerade, comment, source=cluster, destination=MULTICAST[cluster.family], destination_negated=True),
        Rule(masquerade, comment, source=cluster, destination=cluster, source_negated=True),
    )
