"""The overlay's benchmarks measure what they say: what crosses, in which size, past which rules; never how fast it was."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from bench import overlay, pod_attachment
from bench.overlay_load import SMALL, Generator, cpu_of, open_generator
from bench.overlay_offloads import features, segments_in_hardware, set_features
from bench.overlay_paths import ROUTING, VXLAN, way_named
from bench.overlay_rig import UPLINK, Rig, attach_routed, batch, drops, open_rig, segmenting
from bench.plots import draw
from bench.result import Machine, Options, Result, Row, value_of
from kernelstate.linux import netns as namespaces
from nodeplane.commands import Failed

pytestmark = pytest.mark.kernel

TIMES = overlay.Times(stream=60, flood=60, ping=200)
MACHINE = Machine("6.18", "2 x CPU", "0123456789ab", "nodeplane bench overlay")


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    with open_generator() as one:
        yield one


@contextmanager
def rig_with(way: str) -> Iterator[Rig]:
    """Make a pair of nodes with that way between them, and attach a pod to each."""
    with ExitStack() as undo:
        rig = undo.enter_context(open_rig())
        mtu = way_named(way).program(undo, rig).mtu
        for end in rig.ends:
            attach_routed(end, mtu)
        yield rig


def sent_by_uplink(rig: Rig) -> tuple[int, int]:
    """Return bytes and packets that node a has sent to node b so far."""

    def read() -> tuple[int, int]:
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        fields = next(line for line in lines if line.strip().startswith(f"{UPLINK}:")).partition(":")[2].split()
        return int(fields[8]), int(fields[9])

    return namespaces.call(rig.a.node, read)


def test_all_that_is_sent_is_accounted_for(generator):
    """What the listening end counts is what came through the uplink, and both ends' CPU time is in the sum."""
    with rig_with(ROUTING) as rig:
        generator.largest(rig, 1500)
        before = sent_by_uplink(rig)
        stream = generator.stream(rig, 60)
        payload = sent_by_uplink(rig)[0] - before[0]
        assert 0 < stream.bytes < payload < 1.2 * stream.bytes
        before = sent_by_uplink(rig)
        flood = generator.flood(rig, 30)
        size, packets = (now - then for now, then in zip(sent_by_uplink(rig), before, strict=True))
        assert flood.received == flood.sent - drops(rig) <= packets
        assert size / packets == pytest.approx(SMALL + 28 + 14, abs=2)
        pings = generator.ping(rig, 20)
        assert pings.rounds > 0
        assert pings.median <= pings.p99
        assert min(stream.cpu, flood.cpu, stream.ns, flood.ns, pings.median) > 0


def test_packets_that_do_not_fit_end_the_benchmark(generator):
    """Where packets of the MTU that pods are told cannot cross, there is no figure."""
    with rig_with(ROUTING) as rig:
        batch(rig.a.node, f"link set {UPLINK} mtu 1400")
        with pytest.raises(Failed, match=r"(no answer to|send 1472 bytes)"):
            generator.largest(rig, 1500)


def test_a_segmenting_underlay_segments(generator):
    """Packets larger than the MTU cross the one underlay and not the other, over VXLAN as well, and offloads are as before then."""
    with rig_with(VXLAN) as rig:
        before = namespaces.call(rig.a.node, features, UPLINK)
        for is_segmenting in (False, True, False):
            with ExitStack() as hardware:
                if is_segmenting:
                    hardware.enter_context(segmenting(rig))
                start = sent_by_uplink(rig)
                generator.stream(rig, 60)
                size, packets = (now - then for now, then in zip(sent_by_uplink(rig), start, strict=True))
            assert (size / packets <= 1514) == is_segmenting
        assert namespaces.call(rig.a.node, features, UPLINK) == before


def test_offloads_by_name(netns):
    """What is turned off is off, what went with it is said, and a name that no kernel has is passed over."""
    batch(netns, "link add eth0 type veth peer name eth1")
    with namespaces.inside(netns):
        before = features("eth0")
        changed = set_features("eth0", {"tx-tcp-segmentation": False, "rx-gro": before["rx-gro"], "no-such": True})
        assert changed["tx-tcp-segmentation"]
        assert features("eth0") == before | {name: not was for name, was in changed.items()}
        assert set_features("eth0", changed).keys() == changed.keys()
        assert features("eth0") == before
    assert [segments_in_hardware(n) for n in ("tx-udp_tnl-segmentation", "tx-generic-segmentation", "rx-gro")] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(("bridged", "rules", "tracked"), [(True, True, True), (True, False, False), (False, True, True)])
def test_rules_see_packets_where_they_should(generator, bridged, rules, tracked):
    """Connections are tracked with flannel's rules, on a bridge too, and nowhere else: the comparison is with what flannel does."""
    with ExitStack() as undo:
        rig = undo.enter_context(open_rig())
        attachment = pod_attachment.Attachment("", bridged=bridged, rules=rules)
        lane = pod_attachment.open_lane(generator, attachment, rig)
        generator.flood(lane.rig, 30)
        assert (int(namespaces.run(rig.b.node, ["conntrack", "-C"])) > 0) == tracked
        counted = namespaces.run(rig.b.node, ["iptables-legacy", "-t", "filter", "-nvxL", "FORWARD"]).splitlines()[2:]
        assert (bool(counted) and int(counted[0].split()[0]) > 0) == rules


def test_every_way_is_measured(capsys, tmp_path):
    """Each way is measured over both underlays, ratios are to host-gw, claims name ways of the run, and nothing is left."""
    before = set(namespaces.names())
    rows = overlay.measure(Options(), rounds=1, times=TIMES)
    ways = [way.name for way in overlay.ways_here()]
    for underlay in (overlay.SUPERPACKETS, overlay.SEGMENTING):
        for figure in (*overlay.COMPARED, *overlay.COUNTED):
            own = [r for r in rows if r.metric == figure.metric and r.params.get("underlay") == underlay and not is_claim(r)]
            assert [row.name for row in own] == ways
            for row in own:
                bare = value_of(rows, overlay.HOST_GW, figure.metric, underlay=underlay)
                has_ratio = figure in overlay.COMPARED and row.name != overlay.HOST_GW
                assert row.baseline_ratio == (row.value / bare if has_ratio else None)
    mtus = {row.name: row.value for row in rows if row.metric == "MTU"}
    expected = {
        "routing": 1500,
        "host-gw": 1500,
        "vxlan": 1450,
        "udp userspace": 1472,
        "udp kernel": 1472,
        "plain loop": 1472,
        "fou": 1472,
    }
    assert mtus == {name: value for name, value in expected.items() if name in ways}
    claims = [row for row in rows if is_claim(row)]
    assert len(claims) == sum(len(c.underlays) for c in overlay.CLAIMS if {c.way, c.other} <= set(ways))
    assert not {name for name in set(namespaces.names()) - before if name.startswith(f"np-bench-{os.getpid()}-")}
    draw(Result("overlay", MACHINE, rows), tmp_path / "overlay.png")
    assert (tmp_path / "overlay.png").stat().st_size > 20_000


def test_every_attachment_is_measured(tmp_path):
    """Each attachment is measured, and a claim is the ratio of the two that it names."""
    rows = pod_attachment.measure(Options(), rounds=1, flood=100)
    own = {row.name: row for row in rows if row.metric == "64-byte packets" and not is_claim(row)}
    assert list(own) == [attachment.name for attachment in pod_attachment.ATTACHMENTS]
    carried, claim = (row for row in rows if is_claim(row))
    assert (carried.metric, claim.metric) == (pod_attachment.CARRIED, "64-byte packets")
    routed, reference = own[pod_attachment.ROUTED], own[pod_attachment.BRIDGED_WITH_RULES]
    assert claim.value == pytest.approx(routed.value / reference.value)
    assert (routed.baseline_ratio, reference.baseline_ratio) == (pytest.approx(claim.value), None)
    draw(Result("pod-attachment", MACHINE, rows), tmp_path / "pod-attachment.png")
    assert (tmp_path / "pod-attachment.png").stat().st_size > 10_000


def test_cpu_time_of_forwarders_counts():
    """A process on the way adds what it runs, with its threads, to what the kernel's own threads take."""
    with subprocess.Popen(["sh", "-c", "echo; read x; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo; read x"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout.readline() == b"\n"
        idle = cpu_of([process.pid])
        others = cpu_of([])
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"\n"
        worked, softirqs = cpu_of([process.pid]) - idle, cpu_of([]) - others
        process.stdin.write(b"\n")
    assert worked - softirqs > 5_000_000


def is_claim(row: Row) -> bool:
    return row.name.startswith("claim: ")
