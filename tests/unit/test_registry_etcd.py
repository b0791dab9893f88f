"""Leases in etcd: keys and values as flannel writes them, which subnet a node takes, and who is in the overlay by them."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from random import Random

import pytest

from overlay.lease import Vtep, derived_mac
from overlay.netconf import HostGwBackend, NetConf, NetConfError, SubnetRange, UdpBackend
from overlay.registry.etcd import (
    Entry,
    LeaseAttrs,
    LeaseError,
    NoLeaseError,
    Subnets,
    own_attrs,
    own_member,
    parse_config,
    parse_entry,
    parse_key,
    print_attrs,
)
from overlay.registry.etcd_book import LeaseBook
from overlay.registry.etcd_claim import Claim, Held, choose
from overlay.registry.subnets import pool_of, pools_of
from overlay.subnet_env import read_subnet_env

MAC = "c6:d2:32:6f:8f:44"
VALUE = f'{{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{MAC}"}}}}'
DUAL_VALUE = (
    '{"PublicIP":"192.168.64.3","PublicIPv6":"fd00::3","BackendType":"vxlan",'
    f'"BackendData":{{"VNI":1,"VtepMAC":"{MAC}"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"{MAC}"}}}}'
)
CONF = NetConf(ip_network("10.5.0.0/16"))
DUAL = NetConf(ip_network("10.5.0.0/16"), ip_network("fc00::/48"))
OWN_IP = IPv4Address("192.168.64.1")


# -- text ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "subnets"),
    [
        ("10.5.52.0-24", Subnets(ip_network("10.5.52.0/24"))),
        ("10.5.52.0-24&fc00:0:0:1::-64", Subnets(ip_network("10.5.52.0/24"), ip_network("fc00:0:0:1::/64"))),
        ("10.5.0.4-30&fc00::-126", Subnets(ip_network("10.5.0.4/30"), ip_network("fc00::/126"))),
    ],
)
def test_keys(key: str, subnets: Subnets) -> None:
    """A key is read, and written again byte for byte."""
    assert parse_key(key) == subnets
    assert subnets.name == key


@pytest.mark.parametrize(
    ("value", "attrs"),
    [
        (VALUE, LeaseAttrs(IPv4Address("192.168.64.3"), None, "vxlan", (Vtep(1, MAC), None))),
        (DUAL_VALUE, LeaseAttrs(IPv4Address("192.168.64.3"), IPv6Address("fd00::3"), "vxlan", (Vtep(1, MAC), Vtep(1, MAC)))),
        ('{"PublicIP":"192.168.64.3","PublicIPv6":null}', LeaseAttrs(IPv4Address("192.168.64.3"))),
        (
            '{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"host-gw"}',
            LeaseAttrs(IPv4Address("192.168.64.3"), None, "host-gw"),
        ),
    ],
)
def test_values(value: str, attrs: LeaseAttrs) -> None:
    """A value is read, and written again byte for byte as flannel does."""
    assert parse_entry("10.5.52.0-24", value, 7, 9) == Entry(Subnets(ip_network("10.5.52.0/24")), attrs, value, 7, 9)
    assert print_attrs(attrs) == value


def test_values_in_other_writings() -> None:
    """Case of names does not count, as for Go; what belongs to other backends is passed over."""
    entry = parse_entry("10.5.52.0-24", '{"publicip":"192.168.64.3","BackendType":"wireguard","BackendData":{"PublicKey":"x"}}')
    assert entry.attrs == LeaseAttrs(IPv4Address("192.168.64.3"), None, "wireguard")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("10.5.52.0", VALUE, "the key must be like 10.5.52.0-24 or 10.5.52.0-24&fc00:0:0:1::-64"),
        ("10.5.52.0-24&", VALUE, "the key must be like 10.5.52.0-24 or 10.5.52.0-24&fc00:0:0:1::-64"),
        ("fc00::-64", VALUE, "the key must be like 10.5.52.0-24 or 10.5.52.0-24&fc00:0:0:1::-64"),
        ("10.5.52.1-24", VALUE, "10.5.52.1/24 has host bits set"),
        ("10.5.300.0-24", VALUE, "Octet 300 (> 255) not permitted in '10.5.300.0'"),
        ("10.5.52.0-24", "", "is not JSON"),
        ("10.5.52.0-24", "[]", "is not a JSON object"),
        ("10.5.52.0-24", "{}", "PublicIP: is not an IPv4 address"),
        ("10.5.52.0-24", '{"PublicIP":"fd00::1"}', "PublicIP: is not an IPv4 address"),
        ("10.5.52.0-24", '{"PublicIP":3232235777}', "PublicIP: is not an IPv4 address"),
        ("10.5.52.0-24", '{"PublicIP":"192.168.1.1","PublicIPv6":""}', "PublicIPv6: is not an IPv6 address"),
        ("10.5.52.0-24", '{"PublicIP":"192.168.1.1","BackendType":3}', "BackendType: is not text"),
        (
            "10.5.52.0-24",
            '{"PublicIP":"192.168.1.1","BackendType":"vxlan","BackendData":{"VNI":1}}',
            'BackendData: must be like {"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}, is \'{"VNI":1}\'',
        ),
    ],
)
def test_what_makes_no_sense(key: str, value: str, reason: str) -> None:
    """A key or value that cannot be read is an error with key, value and reason."""
    with pytest.raises(LeaseError) as caught:
        parse_entry(key, value)
    assert str(caught.value) == f"etcd key {key}: value {value!r}: {reason}"


def test_subnet_env_is_read() -> None:
    """The subnets that flannel wrote into subnet.env are found in it, and nothing in a file of another kind."""
    text = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.52.1/24\nFLANNEL_IPV6_SUBNET=fc00:0:0:1::1/64\nFLANNEL_MTU=1450\n"
    assert read_subnet_env(text) == (ip_network("10.5.52.0/24"), ip_network("fc00:0:0:1::/64"))
    assert read_subnet_env("FLANNEL_SUBNET=x\n\x00") == ()


# -- the subnets to be had ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "stated", "length", "first", "last"),
    [
        ("10.5.0.0/16", SubnetRange(), 24, "10.5.1.0", "10.5.255.0"),
        ("10.5.0.0/22", SubnetRange(), 24, "10.5.1.0", "10.5.3.0"),
        ("10.5.0.0/23", SubnetRange(), 25, "10.5.0.128", "10.5.1.128"),
        ("10.5.0.0/28", SubnetRange(), 30, "10.5.0.4", "10.5.0.12"),
        ("10.5.0.0/16", SubnetRange(28, ip_address("10.5.7.16"), ip_address("10.5.7.64")), 28, "10.5.7.16", "10.5.7.64"),
        ("fc00::/48", SubnetRange(), 64, "fc00:0:0:1::", "fc00:0:0:ffff::"),
        ("fc00::/63", SubnetRange(), 65, "fc00:0:0:0:8000::", "fc00:0:0:1:8000::"),
    ],
)
def test_defaults(network: str, stated: SubnetRange, length: int, first: str, last: str) -> None:
    """SubnetLen, SubnetMin and SubnetMax default as flannel's do; the first subnet is never used."""
    one = ip_network(network)
    conf = NetConf(one, subnets=stated) if one.version == 4 else NetConf(None, one, ipv6_subnets=stated)
    pool = pool_of(conf, one.version)
    assert (pool.length, pool.first, pool.last) == (length, int(ip_address(first)), int(ip_address(last)))


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        (NetConf(ip_network("10.5.0.0/29")), "Network: must be /28 or larger to be divided, is 10.5.0.0/29"),
        (NetConf(ip_network("10.5.0.0/16"), ip_network("fc00::/125")), "IPv6Network: must be /124 or larger to be divided"),
        (NetConf(ip_network("10.5.0.0/16"), subnets=SubnetRange(24, ip_address("10.5.1.128"))), "SubnetMin: must be the first"),
        (
            NetConf(ip_network("10.5.0.0/16"), subnets=SubnetRange(24, None, ip_address("10.5.1.1"))),
            "SubnetMax: must be the first",
        ),
        (
            NetConf(ip_network("10.5.0.0/16"), subnets=SubnetRange(24, ip_address("10.5.9.0"), ip_address("10.5.8.0"))),
            "SubnetMin: must not be behind SubnetMax, is 10.5.9.0",
        ),
        (
            NetConf(None, ip_network("fc00::/48")),
            "EnableIPv4: must be true with leases in etcd: flannel's keys begin with an IPv4",
        ),
    ],
)
def test_ranges_that_cannot_be(conf: NetConf, words: str) -> None:
    """What flannel refuses, and a cluster without IPv4, which its keys cannot name, is an error that names the field."""
    with pytest.raises(NetConfError, match=words):
        pools_of(conf)


def test_config_in_etcd() -> None:
    """The network that etcd says is read as net-conf is, and checked for dividing."""
    assert parse_config('{"Network":"10.5.0.0/16","Backend":{"Type":"udp"}}') == NetConf(
        ip_network("10.5.0.0/16"), backend=UdpBackend()
    )
    for text, words in (("{", "config: is not JSON"), ("[]", "config: is not a JSON object"), ("{}", "Network: must be given")):
        with pytest.raises(NetConfError, match=words):
            parse_config(text)


def test_free_subnets() -> None:
    """Free is what overlaps nothing taken, whatever the length of that; the first hundred, in order."""
    pool = pool_of(CONF, 4)
    taken = [ip_network(n) for n in ("10.5.0.0/22", "10.5.5.128/25", "10.5.7.0/24", "10.6.0.0/16", "fc00::/48")]
    assert [str(n) for n in pool.free(taken, 4)] == ["10.5.4.0/24", "10.5.6.0/24", "10.5.8.0/24", "10.5.9.0/24"]
    assert len(pool.free([])) == 100
    assert pool.free([ip_network("10.5.0.0/16")]) == []
    assert [str(n) for n in pool.free([ip_network("10.5.0.0/17")])[:1]] == ["10.5.128.0/24"]


# -- which one a node takes ----------------------------------------------------------------------------------------------


def entry(key: str, ip: str, lease: int = 1, revision: int = 1, backend: str = "vxlan") -> Entry:
    """Return a lease of a vxlan node."""
    vtep = Vtep(1, derived_mac(ip, 1, 4)) if backend == "vxlan" else None
    attrs = LeaseAttrs(IPv4Address(ip), None, backend, (vtep, None))
    return Entry(parse_key(key), attrs, print_attrs(attrs), lease, revision)


def taken_by(
    *entries: Entry, conf: NetConf = CONF, held: Held | None = None, previous: tuple[str, ...] = (), seed: int = 1
) -> tuple[str, Claim]:
    """Return what the node at OWN_IP takes."""
    networks = tuple(ip_network(n) for n in previous)
    claim = choose(entries, pools_of(conf), OWN_IP, held=held, previous=networks, random=Random(seed))
    return claim.subnets.name, claim


OTHER, MINE = entry("10.5.9.0-24", "192.168.64.9"), entry("10.5.7.0-24", "192.168.64.1")


def test_own_lease_is_taken_again() -> None:
    """The lease with this node's PublicIP is its own, as for flannel; of several the newest, and the others go."""
    assert taken_by(OTHER, MINE) == ("10.5.7.0-24", Claim(MINE.subnets, MINE, ()))
    newer = entry("10.5.8.0-24", "192.168.64.1", 2, 5)
    assert taken_by(MINE, newer) == ("10.5.8.0-24", Claim(newer.subnets, newer, (MINE,)))


def test_held_key_is_kept_over_a_new_address() -> None:
    """A node whose address has changed knows its key by the lease; a key of that name under another lease is not its own."""
    old = entry("10.5.7.0-24", "192.168.64.77", 5)
    assert taken_by(OTHER, old, held=Held("10.5.7.0-24", 5)) == ("10.5.7.0-24", Claim(old.subnets, old, ()))
    name, claim = taken_by(OTHER, old, held=Held("10.5.7.0-24", 6))
    assert name != "10.5.7.0-24"
    assert claim.entry is None


def test_reservations() -> None:
    """A key without lease is its node's, of whatever length inside the network, before any lease; nobody else takes it."""
    reserved = entry("10.5.200.0-25", "192.168.64.1", lease=0)
    assert taken_by(OTHER, MINE, reserved) == ("10.5.200.0-25", Claim(reserved.subnets, reserved, (MINE,)))
    outside = entry("10.99.0.0-24", "192.168.64.1", lease=0)
    name, claim = taken_by(outside)
    assert name.startswith("10.5.")
    assert (claim.entry, claim.stale) == (None, ())
    everything = [entry(f"10.5.{i}.0-24", f"192.168.65.{i}", lease=0) for i in range(1, 255)]
    assert taken_by(*everything)[0] == "10.5.255.0-24"


def test_lease_of_another_kind_is_replaced() -> None:
    """A lease that does not fit the configuration any more goes; what still fits of it, or of what the node had, is kept."""
    wrong = entry("10.5.7.0-25", "192.168.64.1")
    name, claim = taken_by(wrong, previous=("10.5.30.0/24", "10.5.31.0/24"))
    assert (name, claim.entry, claim.stale) == ("10.5.30.0-24", None, (wrong,))
    name, claim = taken_by(MINE, conf=DUAL, previous=("fc00:0:0:9::/64",))
    assert (name, claim.stale) == ("10.5.7.0-24&fc00:0:0:9::-64", (MINE,))


def test_previous_subnet_if_it_is_free() -> None:
    """Without a lease the node takes the subnet it had, unless somebody has it now; else one drawn among the first hundred."""
    assert taken_by(OTHER, previous=("10.5.30.0/24",))[0] == "10.5.30.0-24"
    assert taken_by(OTHER, previous=("10.5.9.0/24", "10.5.31.0/24"))[0] == "10.5.31.0-24"
    assert taken_by(OTHER, previous=("10.5.9.0/24", "10.77.0.0/24"))[0] not in {"10.5.9.0-24", "10.77.0.0-24"}
    drawn = {int(taken_by(OTHER, seed=seed)[0].split(".")[2]) for seed in range(300)}
    assert drawn <= set(range(1, 102)) - {9}
    assert len(drawn) > 80


def test_what_cannot_be_read_is_taken() -> None:
    """A key with a value that makes no sense is nobody's, and taken all the same: no node would ever get it."""
    book = LeaseBook()
    book.replace([("subnets/10.5.30.0-24", "{", 1, 1), ("subnets/x", "{", 1, 2)], 2)
    assert book.unreadable == [ip_network("10.5.30.0/24")]
    previous = (ip_network("10.5.30.0/24"), ip_network("10.5.31.0/24"))
    claim = choose([], pools_of(CONF), OWN_IP, held=None, previous=previous, blocked=book.unreadable, random=Random(1))
    assert claim.subnets.name == "10.5.31.0-24"


def test_nothing_is_left() -> None:
    """A network that is full says so."""
    conf = NetConf(ip_network("10.5.0.0/22"))
    full = [entry(f"10.5.{i}.0-24", f"192.168.65.{i}") for i in range(1, 4)]
    with pytest.raises(NoLeaseError, match=r"no free /24 is left in 10\.5\.0\.0/22"):
        taken_by(*full, conf=conf)


# -- what a node states, and who is in the overlay -----------------------------------------------------------------------


def test_own_value() -> None:
    """A node states address, backend and tunnel ends; the MAC is one it had for this VNI, else derived from its name."""
    ips: Mapping[int, IPv4Address | IPv6Address] = {4: OWN_IP, 6: IPv6Address("fd00::1")}
    derived = (Vtep(1, derived_mac("n1", 1, 4)), Vtep(1, derived_mac("n1", 1, 6)))
    assert own_attrs(CONF, "n1", ips) == LeaseAttrs(OWN_IP, None, "vxlan", (derived[0], None))
    assert own_attrs(DUAL, "n1", ips) == LeaseAttrs(OWN_IP, IPv6Address("fd00::1"), "vxlan", derived)
    had = [LeaseAttrs(OWN_IP, None, "vxlan", (Vtep(2, MAC), None)), LeaseAttrs(OWN_IP, None, "vxlan", (Vtep(1, MAC), None))]
    assert own_attrs(DUAL, "n1", ips, had).vteps == (Vtep(1, MAC), derived[1])
    udp, host_gw = NetConf(CONF.network, backend=UdpBackend()), NetConf(CONF.network, backend=HostGwBackend())
    assert own_attrs(udp, "n1", ips, had) == LeaseAttrs(OWN_IP)
    assert own_attrs(host_gw, "n1", ips, had) == LeaseAttrs(OWN_IP, None, "host-gw")
    with pytest.raises(NoLeaseError, match=r"no IPv6 address to tell the others; set overlay\.publicIP or"):
        own_attrs(DUAL, "n1", {4: OWN_IP})


def members(*keys: tuple[str, str, int, int], conf: NetConf = CONF) -> tuple[dict[str, list[str]], list[str]]:
    """Return pod networks by node as the node with 10.5.1.0/24 sees them, and all problems."""
    book = LeaseBook()
    book.replace([(f"subnets/{name}", value, lease, revision) for name, value, lease, revision in keys], 100)
    subnets = Subnets(ip_network("10.5.1.0/24"), ip_network("fc00:0:0:1::/64") if conf.ipv6_network else None)
    attrs = own_attrs(conf, "n1", {4: OWN_IP, 6: IPv6Address("fd00::1")})
    found = book.members(own_member("n1", subnets, attrs, conf), subnets.name, conf)
    assert found[0].node == "n1"
    networks = {m.node: [str(r.pod_cidr) for r in m.registrations] for m in found[1:] if m.registrations}
    return networks, [str(problem) for m in found for problem in m.problems]


HOST_GW_VALUE, UDP_VALUE = VALUE.replace("vxlan", "host-gw"), '{"PublicIP":"192.168.64.3","PublicIPv6":null}'


@pytest.mark.parametrize(
    ("keys", "networks", "problems"),
    [
        ([("10.5.52.0-24", VALUE, 1, 1)], {"192.168.64.3": ["10.5.52.0/24"]}, []),
        (
            [("10.5.52.0-24", VALUE, 1, 1), ("10.5.53.0-24", VALUE, 2, 2)],
            {"192.168.64.3": ["10.5.53.0/24"]},
            ["Node 192.168.64.3: etcd key 10.5.52.0-24: 192.168.64.3: was written before 10.5.53.0-24, which counts"],
        ),
        (
            [("10.5.52.0-24", HOST_GW_VALUE, 1, 1)],
            {},
            [
                (
                    "Node 192.168.64.3: BackendType: host-gw: the backend here is vxlan; "
                    "nodes of different backends do not reach each other"
                )
            ],
        ),
        ([("10.5.52.0-24", UDP_VALUE, 0, 1)], {}, []),
        (
            [("10.5.52.0-24", UDP_VALUE, 1, 1)],
            {},
            [
                (
                    "Node 192.168.64.3: BackendType: nothing: the backend here is vxlan; "
                    "nodes of different backends do not reach each other"
                )
            ],
        ),
        (
            [("10.99.52.0-24", VALUE, 1, 1)],
            {},
            ["Node 192.168.64.3: etcd key 10.99.52.0-24: 10.99.52.0/24: is not inside Network 10.5.0.0/16"],
        ),
        (
            [("10.5.52.0-24", VALUE.replace("192.168.64.3", "10.5.9.9"), 1, 1)],
            {},
            [
                (
                    "Node 10.5.9.9: PublicIP: 10.5.9.9: lies inside the pod network 10.5.0.0/16: "
                    "packets to the node would go into the tunnel"
                )
            ],
        ),
        (
            [("10.5.52.0-24", VALUE.replace("192.168.64.3", "224.0.0.3"), 1, 1)],
            {},
            ["Node 224.0.0.3: PublicIP: 224.0.0.3: is not the address of one node"],
        ),
        (
            [("10.5.52.0-24", VALUE.replace('"VNI":1', '"VNI":2'), 1, 1)],
            {},
            [
                (
                    f'Node 192.168.64.3: BackendData: {{"VNI":2,"VtepMAC":"{MAC}"}}: the VNI here is 1; '
                    "tunnels of different VNIs do not meet"
                )
            ],
        ),
        (
            [("10.5.52.0-24", VALUE.replace("192.168.64.3", "192.168.64.1"), 1, 1)],
            {},
            [
                (
                    "Node 192.168.64.1: etcd key 10.5.52.0-24: 192.168.64.1: is the address of this node, whose key is 10.5.1.0-24; "
                    "that is to be deleted if the node shall take this one"
                )
            ],
        ),
        (
            [("10.5.52.0-24", "{", 1, 1), ("x", VALUE, 1, 2), ("10.5.53.0-24", VALUE, 1, 3)],
            {"192.168.64.3": ["10.5.53.0/24"]},
            [
                "Node 10.5.52.0-24: etcd value: {: is not JSON",
                f"Node x: etcd value: {VALUE}: the key must be like 10.5.52.0-24 or 10.5.52.0-24&fc00:0:0:1::-64",
            ],
        ),
    ],
)
def test_members(keys: list[tuple[str, str, int, int]], networks: dict[str, list[str]], problems: list[str]) -> None:
    """A lease is a peer, or is left out with node, field, value and reason; a reservation nobody has taken is neither."""
    assert members(*keys) == (networks, problems)


def test_members_of_both_families() -> None:
    """A lease of both families is a peer in both; one that lacks IPv6 is one in IPv4, and that is told."""
    v4_only = VALUE.replace("192.168.64.3", "192.168.64.4")
    found, problems = members(("10.5.52.0-24&fc00:0:0:52::-64", DUAL_VALUE, 1, 1), ("10.5.53.0-24", v4_only, 1, 2), conf=DUAL)
    assert found == {"192.168.64.3": ["10.5.52.0/24", "fc00:0:0:52::/64"], "192.168.64.4": ["10.5.53.0/24"]}
    assert problems == ["Node 192.168.64.4: etcd key 10.5.53.0-24: 10.5.53.0-24: has no IPv6 subnet"]


def test_udp_says_nothing_of_itself() -> None:
    """With backend udp, values without BackendType are peers, and others are not."""
    udp = NetConf(CONF.network, backend=UdpBackend())
    vxlan = VALUE.replace("192.168.64.3", "192.168.64.4")
    found, problems = members(("10.5.52.0-24", UDP_VALUE, 1, 1), ("10.5.53.0-24", vxlan, 1, 2), conf=udp)
    assert found == {"192.168.64.3": ["10.5.52.0/24"]}
    assert len(problems) == 1


# -- an etcd that went back ----------------------------------------------------------------------------------------------


def held(book: LeaseBook) -> set[str]:
    """Return the keys that a book knows."""
    return {one.subnets.name for one in book.known}


def value_of(i: int) -> str:
    return VALUE.replace("192.168.64.3", f"192.168.64.{i}")


def test_missing_keys_are_gone() -> None:
    """A key that a later listing lacks has been deleted while nobody looked."""
    book = LeaseBook()
    book.replace([("subnets/10.5.2.0-24", value_of(2), 1, 5), ("subnets/10.5.3.0-24", value_of(3), 1, 6)], 6)
    book.replace([("subnets/10.5.3.0-24", value_of(3), 1, 6)], 9)
    assert held(book) == {"10.5.3.0-24"}


def test_an_emptied_etcd_ends_no_lease() -> None:
    """Whoever an etcd of a lower revision lacks is remembered, until it writes, another has its subnet, or it is forgotten."""
    book = LeaseBook()
    book.replace([(f"subnets/10.5.{i}.0-24", value_of(i), 1, i) for i in range(2, 7)], 50)
    book.replace([("subnets/10.5.3.0-24", value_of(3), 9, 2)], 2)
    assert held(book) == {f"10.5.{i}.0-24" for i in range(2, 7)}
    book.put("subnets/10.5.77.0-24", value_of(2), 9, 3)
    book.put("subnets/10.5.4.0-24", value_of(44), 9, 4)
    assert held(book) == {"10.5.77.0-24", *(f"10.5.{i}.0-24" for i in (3, 4, 5, 6))}
    assert book.entries["10.5.4.0-24"].attrs.public_ip == IPv4Address("192.168.64.44")
    book.replace([("subnets/10.5.3.0-24", value_of(3), 9, 2)], 8)
    assert held(book) == {"10.5.3.0-24", "10.5.5.0-24", "10.5.6.0-24"}
    book.forget()
    assert held(book) == {"10.5.3.0-24"}


def test_what_is_older_changes_nothing() -> None:
    """A change that is older than what this node wrote itself does not undo it."""
    book = LeaseBook()
    book.put("subnets/10.5.2.0-24", value_of(2), 1, 9)
    book.put("subnets/10.5.2.0-24", value_of(7), 1, 8)
    book.delete("subnets/10.5.2.0-24", 8)
    assert book.entries["10.5.2.0-24"].value == value_of(2)
    book.delete("subnets/10.5.2.0-24", 10)
    assert held(book) == set()
