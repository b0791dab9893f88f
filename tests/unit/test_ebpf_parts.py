"""Services at the socket, part by part: rows of what is left to rules, the bytes, maps that are full, and who may ask."""

from __future__ import annotations

import json
import subprocess
from ipaddress import ip_address
from pathlib import Path

import msgspec
import pytest

from kernelstate import service_maps as codec
from kernelstate.errors import KernelRefusedError
from kernelstate.fake_ebpf import FakeServiceMaps
from kernelstate.objects.address import Prefix
from kernelstate.objects.ebpf import Pool, SocketChange, SocketFrontend, SocketService, SocketTables, Who
from kernelstate.reconcile_ebpf import SocketReconciler
from kernelstate.service_layout import FEWEST, Layout, Sizes
from kernelstate.slots import NoRoomError, Slots
from proxy.render.ebpf import LEFT, SocketContext, own_addresses, render_entries
from proxy.settings import NodeFacts, ProxySettings
from proxy.table import Backend, Frontend, Kind, PortName, ServiceEntry

BUILT = Path(__file__).parents[2] / "packetpath/built"
EVERYBODY = Who.NODE | Who.PODS
NODE = NodeFacts("n1", addresses=(ip_address("192.168.1.1"),), local_addresses=(Prefix.parse("192.168.1.1/32"),))
SETTINGS = ProxySettings(cluster_cidrs=(Prefix.parse("10.244.0.0/16"),), node_port_addresses="primary")
HERE, THERE = (
    Backend("10.244.1.2:8080", ip_address("10.244.1.2"), 8080, local=True),
    Backend("10.244.2.2:8080", ip_address("10.244.2.2"), 8080),
)
VIP, LB = ip_address("10.96.0.1"), ip_address("203.0.113.1")
CLUSTER = Frontend(Kind.CLUSTER_IP, VIP, 80)
BALANCER = Frontend(Kind.LOAD_BALANCER, LB, 80)
NODE_PORT = Frontend(Kind.NODE_PORT, None, 30080)


def entry(frontend, protocol="TCP", **fields):
    fields = {"cluster": (HERE, THERE), "has_any": True, **fields}
    return ServiceEntry(PortName("ns", "s", "", protocol), 4, (frontend,), **fields)


def rendered(one, settings=SETTINGS, node=NODE):
    found = render_entries(SocketContext.of(settings, node, (4,)), [one])
    assert len(found.frontends) == 1
    (service,) = found.frontends.values()
    return service, tuple(found.pools[service.pool].endpoints) if service.pool else ()


BOTH = ((int(HERE.address), 8080), (int(THERE.address), 8080))
ROWS = {
    "ClusterIP": (entry(CLUSTER), {}, EVERYBODY, BOTH),
    "NodePort": (entry(NODE_PORT), {}, EVERYBODY, BOTH),
    "internal Local": (entry(CLUSTER, internal_local=True, local=(HERE,)), {}, EVERYBODY, BOTH[:1]),
    "external Local": (entry(BALANCER, external_local=True, local=(HERE,)), {}, EVERYBODY, BOTH),
    "external Local, pods not told": (entry(BALANCER, external_local=True), {"cluster_cidrs": ()}, Who.NODE, BOTH),
    "masqueradeAll": (entry(CLUSTER), {"masquerade_all": True}, Who.NODE, BOTH),
    "UDP": (entry(CLUSTER, "UDP"), {}, EVERYBODY, BOTH),
    "UDP while flows are drained": (entry(CLUSTER, "UDP"), {"flows_to_removed": "drain"}, EVERYBODY, BOTH),
    "TCP while flows are drained": (entry(CLUSTER), {"flows_to_removed": "drain"}, Who.NOBODY, ()),
    "UDP with affinity": (entry(CLUSTER, "UDP", affinity_seconds=600), {}, Who.NOBODY, ()),
    "consistent": (entry(CLUSTER, consistent=True), {}, Who.NOBODY, ()),
    "source ranges": (entry(BALANCER, source_ranges=(ip_address,)), {}, Who.NOBODY, ()),
    "source ranges, NodePort": (entry(NODE_PORT, source_ranges=(ip_address,)), {}, EVERYBODY, BOTH),
    "source ranges, NodePort guarded": (
        entry(NODE_PORT, source_ranges=(ip_address,)),
        {"guard_node_ports": True},
        Who.NOBODY,
        (),
    ),
    "the node's own address": (entry(Frontend(Kind.EXTERNAL_IP, NODE.addresses[0], 80)), {}, Who.NOBODY, ()),
}


@pytest.mark.parametrize("row", ROWS)
def test_who_is_led_where(row):
    """Each kind of frontend leads whom it may to the endpoints it should, and is left to rules where it must be."""
    one, options, who, endpoints = ROWS[row]
    service, found = rendered(one, msgspec.structs.replace(SETTINGS, **options))
    assert (service.who, found) == (who, endpoints)
    assert not service.refuses


def test_refusing():
    """Nobody anywhere refuses; nobody here while others exist is left to the rule that drops."""
    assert rendered(entry(CLUSTER, cluster=(), has_any=False))[0].refuses
    left, _ = rendered(entry(CLUSTER, internal_local=True))
    assert (left.pool, left.refuses) == (0, False)
    assert rendered(entry(Frontend(Kind.CLUSTER_IP, NODE.addresses[0], 80), has_any=False))[0] == LEFT


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"192.168.1.1": EVERYBODY, "127.0.0.1": Who.NODE}),
        ({"localhost_node_ports": False}, {"192.168.1.1": EVERYBODY}),
        ({"node_port_addresses": ()}, {"192.168.1.1": EVERYBODY, "127.0.0.1": Who.NODE}),
        ({"node_port_addresses": (Prefix.parse("192.168.0.0/16"),)}, {"192.168.1.1": EVERYBODY}),
        ({"node_port_addresses": (Prefix.parse("127.0.0.0/8"),)}, {"127.0.0.1": Who.NODE}),
    ],
)
def test_where_node_ports_answer(settings, expected):
    """NodePorts answer on the addresses that are set, and the node's own processes on loopback unless it is left out."""
    found = own_addresses(msgspec.structs.replace(SETTINGS, **settings), NODE, (4,))
    assert found == {(4, int(ip_address(a))): who for a, who in expected.items()}


def test_bytes_are_the_programs():
    """Sizes and offsets of the Python codec are those that clang laid out: from the type information of the built object."""
    command = ["bpftool", "-j", "btf", "dump", "file", str(BUILT / "services_sock.bpf.o"), "format", "raw"]
    types = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=20).stdout)["types"]
    structs = {t["name"]: t for t in types if t["kind"] == "STRUCT"}
    sizes = {
        name: structs[f"np_{name}"]["size"] for name in ("end", "service", "member", "settings", "client", "choice", "talk")
    }
    assert sizes == {
        "end": codec.END, "service": codec.SERVICE, "member": codec.MEMBER, "settings": codec.SETTINGS,
        "client": 16, "choice": 32, "talk": 32,
    }  # fmt: skip
    at = {m["name"]: m["bits_offset"] // 8 for m in structs["np_service"]["members"]}
    value = codec.pack_service(codec.Placed(SocketService(0x1122334455667788, Who.PODS, True, 600), 7, 3))
    for name, size, expected in (
        ("id", 8, 0x1122334455667788), ("first", 4, 7), ("count", 4, 3), ("affinity", 4, 600), ("who", 1, 2), ("how", 1, 1),
    ):  # fmt: skip
        assert int.from_bytes(value[at[name] : at[name] + size], "little") == expected


@pytest.mark.parametrize(("family", "address"), [(4, "10.96.0.1"), (6, "fd00:96::1"), (4, "0.0.0.0"), (6, "::")])
def test_frontends_survive_packing(family, address):
    """What is packed is read back, NodePorts of both families included."""
    frontend = SocketFrontend(family, "udp", int(ip_address(address)), 53)
    assert codec.read_frontend(codec.pack_frontend(frontend)) == frontend


# -- layout and reconciler ---------------------------------------------------------------------------------------------


def tables(*ports, endpoint=1):
    found = SocketTables({}, {}, {})
    for port in ports:
        found.frontends[SocketFrontend(4, "tcp", 1, port)] = SocketService(port, EVERYBODY)
        found.pools[port] = Pool(4, "tcp", ((endpoint, 8080),))
    return found


def brought(maps, wanted, reconciler=None):
    reconciler = reconciler or SocketReconciler(maps, lambda: 0.0)
    reconciler.set_desired(wanted)
    return reconciler, reconciler.sync()


def test_a_pool_moves_before_frontends_lead_there():
    """A changed pool is written to slots that no frontend leads to, then the frontend, and the old slots rest."""
    layout = Layout(Sizes())
    first = layout.fill(tables(80))
    second = layout.change(tables(80, endpoint=2), [SocketFrontend(4, "tcp", 1, 80)], [80], 0.0)
    assert [w.table for w in second] == ["slots", "frontends"]
    assert second[0].put.keys().isdisjoint(first[0].put.keys())
    third = layout.change(tables(80, endpoint=3), [SocketFrontend(4, "tcp", 1, 80)], [80], 0.5)
    assert third[0].put.keys().isdisjoint(first[0].put.keys() | second[0].put.keys())
    fourth = layout.change(tables(80, endpoint=4), [SocketFrontend(4, "tcp", 1, 80)], [80], 1.0)
    assert fourth[0].put.keys() == first[0].put.keys()


def test_maps_in_no_order_are_replaced():
    """Maps whose pools overlap or lead nowhere are not adopted but made anew."""
    maps = FakeServiceMaps()
    brought(maps, tables(80, 81))
    for key, value in maps.maps["frontends"].items():
        placed = codec.read_service(value)
        maps.maps["frontends"][key] = codec.pack_service(placed._replace(first=1 << 20))
    _, report = brought(maps, tables(80, 81))
    assert report.ok
    assert maps.installed == 2


def test_outgrown_maps_are_replaced():
    """Too many Services: larger maps; the kernel never has to refuse."""
    maps = FakeServiceMaps()
    reconciler, _ = brought(maps, tables(80))
    wanted = tables(*range(1, FEWEST))
    _, report = brought(maps, wanted, reconciler)
    assert report.ok
    assert maps.sizes.frontends == 2 * FEWEST
    assert len(maps.maps["frontends"]) == FEWEST - 1


def test_what_is_refused_stays_dirty():
    """A refusal is told, and the next sync looks again and does it."""
    maps = FakeServiceMaps()
    reconciler, _ = brought(maps, tables(80))
    maps.refusing = True
    wanted = tables(80, 81)
    reconciler.set_desired(wanted, SocketChange(frozenset(wanted.frontends), frozenset({81})))
    assert reconciler.sync().errors == (str(KernelRefusedError("write", "programs at sockets", "Operation not permitted")),)
    assert reconciler.dirty
    maps.refusing = False
    assert reconciler.sync().changed == 2
    assert not reconciler.dirty


def test_a_full_array_says_so():
    """Room that is not there is not given."""
    slots = Slots(8)
    slots.take(5, 0.0)
    with pytest.raises(NoRoomError):
        slots.take(1, 0.0)
