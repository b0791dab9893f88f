"""nftables tables made by hand: every form of set, match and statement that a renderer may use, for both families."""

from __future__ import annotations

from kernelstate.objects.address import Family, Prefix
from kernelstate.objects.nftables import (
    AddressIs,
    Chain,
    Chance,
    CtState,
    CtStatus,
    DnatByMap,
    DnatTo,
    DropPacket,
    FibLocal,
    Field,
    Goto,
    GotoChain,
    Hook,
    InSet,
    InterfaceIs,
    Interval,
    JumpChain,
    MarkIs,
    MasqueradeFully,
    NamedSet,
    OrMark,
    ProtocolIs,
    Random,
    Refuse,
    Remember,
    Rule,
    SourceHash,
    Table,
    VerdictMap,
    XorMark,
)

SADDR, DADDR, PROTO, DPORT = (Field(name) for name in ("saddr", "daddr", "l4proto", "dport"))
FRONTEND = (DADDR, PROTO, DPORT)

SERVICES: dict[int, int] = {4: Prefix.parse("10.96.0.0").network, 6: Prefix.parse("fd00:96::").network}
PODS: dict[int, int] = {4: Prefix.parse("10.244.0.0").network, 6: Prefix.parse("fd00:244::").network}
LOOPBACK = {4: Prefix.parse("127.0.0.0/8"), 6: Prefix.parse("::1/128")}
CLUSTER = {4: Prefix.parse("10.244.0.0/16"), 6: Prefix.parse("fd00:244::/64")}
CLIENTS = {4: Prefix.parse("192.168.0.1"), 6: Prefix.parse("fd00:192::1")}


def named_sets() -> dict[str, NamedSet]:
    sets = [
        NamedSet("services", FRONTEND, "verdict", comment="where a frontend leads"),
        NamedSet("node-ports", (PROTO, DPORT), "verdict"),
        NamedSet("endpoints", (*FRONTEND, Random(2)), "endpoint"),
        NamedSet("node-port-endpoints", (PROTO, DPORT, Random(2)), "endpoint"),
        NamedSet("slots", (*FRONTEND, SourceHash(251, 18)), "endpoint"),
        NamedSet("cluster-ips", (DADDR,)),
        NamedSet("hairpin", (SADDR, DADDR, PROTO, DPORT)),
        NamedSet("source-ranges", (*FRONTEND, SADDR), intervals=True),
        NamedSet("cidrs", (DADDR,), intervals=True, comment="ranges"),
        NamedSet("affinity-a", (SADDR,), dynamic=True, timeout=10800, size=65536),
        NamedSet("affinity-map", (SADDR, *FRONTEND), "endpoint", dynamic=True, timeout=30),
    ]
    return {one.name: one for one in sets}


def chains(family: Family) -> dict[str, Chain]:
    to_service = Rule((), (VerdictMap(FRONTEND, "services"),))
    return {
        "reject-chain": Chain((Rule((), (Refuse(),)),)),
        "cluster-ip-2": Chain(
            (
                Rule((AddressIs("saddr", (CLUSTER[family],), negated=True),), (OrMark(0x4000),), "from outside"),
                Rule((), (DnatByMap((SADDR, *FRONTEND), "affinity-map"),)),
                Rule((), (DnatByMap((*FRONTEND, Random(2)), "endpoints"),)),
            )
        ),
        "consistent": Chain((Rule((), (DnatByMap((*FRONTEND, SourceHash(251, 18)), "slots"),)),)),
        "node-port-2": Chain((Rule((), (DnatByMap((PROTO, DPORT, Random(2)), "node-port-endpoints"),)),)),
        "endpoint-a": Chain(
            (
                Rule((ProtocolIs(("tcp",)),), (Remember((SADDR,), "affinity-a"), DnatTo(PODS[family] + 5, 8080))),
                Rule((InSet((SADDR,), "affinity-a", negated=True), Chance(3)), (GotoChain("consistent"),)),
            )
        ),
        "prerouting": Chain(
            (
                to_service,
                Rule(
                    (FibLocal("daddr"), AddressIs("daddr", (LOOPBACK[family],), negated=True)),
                    (VerdictMap((PROTO, DPORT), "node-ports"),),
                ),
            ),
            Hook("nat", "prerouting", -100),
        ),
        "output": Chain((to_service,), Hook("nat", "output", -100)),
        "forward": Chain(
            (
                Rule((CtState(("new",)), InSet((DADDR,), "cluster-ips")), (JumpChain("reject-chain"),)),
                Rule((AddressIs("saddr", (CLUSTER[family], CLIENTS[family])), InterfaceIs("veth*")), (DropPacket(),), "no"),
                Rule((ProtocolIs(("sctp", "udp")), InterfaceIs("lo", negated=True), MarkIs(0x80, negated=True)), (Refuse(),)),
                Rule((InSet((*FRONTEND, SADDR), "source-ranges", negated=True), InSet((DADDR,), "cidrs")), (DropPacket(),)),
            ),
            Hook("filter", "forward", 0),
        ),
        "postrouting": Chain(
            (
                Rule((MarkIs(0x4000),), (XorMark(0x4000), MasqueradeFully())),
                Rule(
                    (CtStatus("dnat"), InSet((SADDR, DADDR, PROTO, DPORT), "hairpin")), (MasqueradeFully(random_fully=False),)
                ),
            ),
            Hook("nat", "postrouting", 100),
        ),
    }


def table(family: Family, services: int = 3) -> Table:
    """Make some Services with two endpoints each, one without any, and one element of every other kind."""
    vip, pod = SERVICES[family], PODS[family]
    numbers = range(1, services + 1)
    frontends = [(vip + n, protocol, 80 + n) for n, protocol in zip(numbers, ("tcp", "udp", "sctp") * services, strict=False)]
    return Table(
        chains(family),
        named_sets(),
        {
            "services": {**dict.fromkeys(frontends, Goto("cluster-ip-2")), (vip, "tcp", 1): "drop", (vip, "tcp", 2): "accept"},
            "node-ports": {("tcp", 30000): Goto("node-port-2"), ("udp", 30000): Goto("reject-chain")},
            "endpoints": {(*f, i): (pod + 2 * n + i, 8080) for n, f in enumerate(frontends) for i in range(2)},
            "node-port-endpoints": {("tcp", 30000, i): (pod + i, 8080) for i in range(2)},
            "slots": {(*frontends[0], slot): (pod + slot, 8080) for slot in range(251)},
            "cluster-ips": dict.fromkeys([(f[0],) for f in frontends]),
            "hairpin": dict.fromkeys([(pod + n, pod + n, "tcp", 8080) for n in numbers]),
            "source-ranges": {
                (*frontends[0], Interval(pod + 256, pod + 511)): None,
                (*frontends[0], Interval(pod + 513, pod + 513)): None,
                (*frontends[0], pod + 515): None,
            },
            "cidrs": {(Interval(vip, vip + 65535),): None, (Interval(vip + 65536, vip + 65537),): None, (vip + 65539,): None},
        },
    )
