"""``ipvs-in-vm``: what IPVS costs the kernel, measured in a virtual machine where this kernel has none, and natively where it has.

    this machine                        one boot of the machine (qemu's translator, its clock counts instructions)
    cluster of N Services
      --> first sync, taken down  -->   node: handed over (kernel apply) --> packets through it --> virtual servers flushed
          for each mode and size                                                                          next node ...

    kernel apply     the kernel's part of the first sync: ipsets, virtual and real servers, addresses by netlink; next to it
                     iptables-legacy-restore and nftables, with the same cluster, in the same machine
    packets          as in ``packet-cost``, by the same generator: established, and the first of a connection

In such a machine an instruction takes a nanosecond and nothing else takes any time, so figures are instructions, repeat to a
per cent, and know no cache: 50,000 Services that do not fit one cost more on a real CPU than here.

Nodes are measured one after the other, smallest first, for IPVS keeps the virtual servers of all namespaces in one table, and their
connections in another (up to Linux 6.1 at least). So those of a node that has been measured are deleted, or waited for.

Every kind of packet is sent twice to the same Services, and the smaller figure counts: by then each real server has been chosen
once, and its route is known.
"""

from __future__ import annotations

import contextlib
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import cluster
from bench.cluster import ENDPOINTS
from bench.fresh import in_fresh_process
from bench.handover import Handover, flush_servers, hand_over, prepare
from bench.injection import DESTINATIONS, Injector, open_injector
from bench.kernel import may_use_kernel
from bench.machine import TREE
from bench.packet_cost import CONNTRACK, DATAPATHS, FORWARDING, TRAFFIC, Datapath, Lane, least, open_lane, pinned, send
from bench.result import Options, Row, against, value_of
from kernelstate.errors import KernelStateError
from kernelstate.linux import netns
from kernelstate.linux.ipvs import LinuxIpvs, has_ipvs
from nodeplane.commands import Failed

SIZES = (10, 1_000, 10_000, 50_000)
LARGEST = {"iptables flat": 1_000, "iptables": 10_000}
"""Where a datapath ends by itself: handing over more takes an emulated CPU minutes. A stated size is measured in every one."""
SETTINGS: dict[str, dict[str, Any]] = {"iptables flat": {"dispatch_above": 0}}
ROUNDS, PACKETS = 2, ENDPOINTS * DESTINATIONS
"""How often each kind is sent, and how many packets: connections to every endpoint of every Service that is asked for."""
FORGOTTEN = 60
"""Seconds after which IPVS forgets a connection, however it stands; the same that it has for those half open, which are most."""
MEMORY_MB = 4096
LONGEST = 1200.0
"""Seconds until the machine is given up."""


class Node(msgspec.Struct):
    """What was found on one node: CPU milliseconds of the first sync by part, and nanoseconds of a packet by kind of traffic."""

    datapath: str
    services: int
    apply: dict[str, float]
    packets: dict[str, float]


class Answer(msgspec.Struct):
    """What the measuring process returns; ``kernel`` is the release of the one that was measured."""

    kernel: str
    nodes: list[Node]


def measure(options: Options, rounds: int = ROUNDS, packets: int = PACKETS, *, native: bool | None = None) -> list[Row]:
    """Measure each mode asked for at each size, or at 10 and the stated one. Raises Failed.

    ``native``: on this kernel, and not in a virtual machine; None: if it has IPVS.
    """
    if not may_use_kernel():
        raise Failed("ipvs-in-vm: making network namespaces, or a virtual machine of this host's files, needs root")
    native = has_ipvs() if native is None else native
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory:
        params = {"directory": directory, "rounds": rounds, "packets": packets, "counted": not native}
        messages = _take_down(Path(directory), options)
        function = "bench.ipvs_in_vm:measure_here"
        answer = in_fresh_process(function, params, Answer) if native else _in_machine(function, params)
    took = time.monotonic() - started
    clock = "CPU time" if native else "counts instructions"
    where = Row(
        "this machine" if native else "virtual machine", "none", {"kernel": answer.kernel, "clock": clock}, "run", took, "s"
    )
    return [where, *rows_of(answer.nodes, messages, counted=not native)]


# -- on this machine ---------------------------------------------------------------------------------------------------


def plan(options: Options) -> Iterator[tuple[int, Datapath]]:
    """Yield what is measured, smallest first, so that each cluster is made once."""
    for services in SIZES if options.services is None else sorted({SIZES[0], options.services}):
        for datapath in DATAPATHS:
            fits = options.services is not None or services <= LARGEST.get(datapath.name, services)
            if datapath.mode in options.modes and fits:
                yield services, datapath


def _take_down(directory: Path, options: Options) -> dict[int, dict[str, int]]:
    """Write each first sync to a file; return how many messages those of mode ipvs are, by Services and part."""
    messages: dict[int, dict[str, int]] = {}
    written = 0
    for number, (services, datapath) in enumerate(plan(options)):
        if services != written:
            cluster.write_list(directory / "cluster.json", services)
            written = services
        handover = prepare(directory / "cluster.json", datapath.mode, services, SETTINGS.get(datapath.name, {}))
        if datapath.mode == "ipvs":
            messages[services] = handover.messages
        path = directory / f"{number:03d}"
        path.write_bytes(msgspec.msgpack.encode((datapath.name, handover)))
    return messages


def _in_machine(function: str, params: dict[str, Any]) -> Answer:
    from netnslab import vm  # noqa: PLC0415  only where the host has no IPVS
    from netnslab.errors import LabError  # noqa: PLC0415
    from netnslab.vm_qemu import Size  # noqa: PLC0415

    command = [sys.executable, "-m", "bench.fresh", function, msgspec.json.encode(params).decode()]
    try:
        size = Size(memory_mb=MEMORY_MB, icount=True)
        done = vm.run(command, folder=TREE, size=size, timeout=LONGEST, listener=_pass_on)
    except LabError as error:
        raise Failed(f"ipvs-in-vm: {error}") from error
    if done.exit_code != 0:
        raise Failed(f"ipvs-in-vm: in the virtual machine: {done.stderr.decode(errors='replace').strip()}")
    return msgspec.json.decode(done.stdout, type=Answer)


def _pass_on(stream: str, data: bytes) -> None:
    """Let a person see how far it is."""
    if stream == "stderr":
        os.write(2, data)


# -- where IPVS is -----------------------------------------------------------------------------------------------------


def measure_here(directory: str, rounds: int, packets: int, *, counted: bool) -> Answer:
    """Measure one node after the other, those without Services first; ``counted``: the clock counts instructions."""
    nodes: list[Node] = []
    files = sorted(Path(directory).glob("[0-9]*"))
    try:
        with contextlib.ExitStack() as undo:
            idler = undo.enter_context(_never_idle()) if counted else None
            injector = undo.enter_context(open_injector())
            undo.enter_context(pinned())
            for datapath in (FORWARDING, CONNTRACK):
                lane = open_lane(undo, injector, datapath, 0)
                nodes.append(Node(datapath.name, 0, {}, _packets(injector, lane, rounds, packets)))
            for file in files:
                name, handover = msgspec.msgpack.decode(file.read_bytes(), type=tuple[str, Handover])
                print(f"ipvs-in-vm: {name} at {handover.services} Services", file=sys.stderr, flush=True)
                datapath = next(one for one in DATAPATHS if one.name == name)
                lane = open_lane(undo, injector, datapath, handover.services)
                spent = _program(lane, handover)
                nodes.append(Node(name, lane.services, spent, _packets(injector, lane, rounds, packets)))
                if handover.servers:
                    _forget(lane, idler)
    except KernelStateError as error:
        raise Failed(f"ipvs-in-vm: {error}") from error
    return Answer(platform.release(), nodes)


@contextlib.contextmanager
def _never_idle() -> Iterator[subprocess.Popen[bytes]]:
    """Use up the time that nobody else wants: a clock that counts instructions jumps to the next timer when there are none.

    So whoever waits for a file of the host, which takes no instruction, would find that his patience of 30 seconds is over.
    """
    with subprocess.Popen(["chrt", "--idle", "0", "sh", "-c", "while :; do :; done"]) as idler:
        try:
            yield idler
        finally:
            idler.kill()


def _program(lane: Lane, handover: Handover) -> dict[str, float]:
    with netns.inside(lane.road.node):
        spent = hand_over(handover)
        if handover.servers:
            with contextlib.closing(LinuxIpvs()) as servers:
                servers.set_timeouts(FORGOTTEN, FORGOTTEN, FORGOTTEN)
    return spent


def _forget(lane: Lane, idler: subprocess.Popen[bytes] | None) -> None:
    """Delete a node's virtual servers and let its connections end: in no time where the clock jumps."""
    with netns.inside(lane.road.node), Path("/proc/thread-self/net/ip_vs_conn").open() as connections:
        flush_servers()
        if idler:
            idler.send_signal(signal.SIGSTOP)
        end = time.monotonic() + 3 * FORGOTTEN
        while sum(1 for _ in connections) > 1:  # the first line is the heading
            if time.monotonic() > end:
                raise Failed(f"ipvs-in-vm: IPVS keeps connections longer than {3 * FORGOTTEN} s")
            time.sleep(5)
            connections.seek(0)
        if idler:
            idler.send_signal(signal.SIGCONT)


def _packets(injector: Injector, lane: Lane, rounds: int, packets: int) -> dict[str, float]:
    """Return nanoseconds of a packet by kind; each round draws the same Services. Raises Failed when one goes elsewhere."""
    return {kind: least([send(injector, lane, kind, random.Random(1), packets) for _ in range(rounds)]) for kind in TRAFFIC}


# -- figures -----------------------------------------------------------------------------------------------------------


def rows_of(nodes: Sequence[Node], messages: dict[int, dict[str, int]], *, counted: bool) -> list[Row]:
    """Return all figures: in instructions if the clock ``counted`` them, else in CPU time."""
    return [*_apply_rows(nodes, messages, counted=counted), *_packet_rows(nodes, counted=counted)]


def _apply_rows(nodes: Sequence[Node], messages: dict[int, dict[str, int]], *, counted: bool) -> list[Row]:
    """Set the kernel's part of a first sync against iptables-restore's with the same cluster, and split IPVS' own."""
    unit = "million instructions" if counted else "ms"
    rows: list[Row] = []
    with_services = [node for node in nodes if node.services]
    restored = {node.services: sum(node.apply.values()) for node in with_services if node.datapath == "iptables"}
    for node in with_services:
        mode, params = _mode(node), _params(node)
        row = Row("first sync", mode, params, "kernel apply", sum(node.apply.values()), unit)
        words = f"iptables-restore at {node.services} services"
        rows.append(row if node.datapath == "iptables" else against(row, restored.get(node.services, 0.0), words))
        if mode == "ipvs":
            rows += [
                Row("first sync", mode, params, f"kernel apply, {part}", spent, unit) for part, spent in node.apply.items()
            ]
            rows += [
                Row("first sync", mode, params, f"sent, {part}", n, "messages") for part, n in messages[node.services].items()
            ]
    return rows


def _packet_rows(nodes: Sequence[Node], *, counted: bool) -> list[Row]:
    """Set every packet's cost against the same at the smallest size of its datapath: that is its growth."""
    metric, unit = ("instructions per packet", "instructions") if counted else ("CPU per packet", "ns")
    rows: list[Row] = []
    for traffic in TRAFFIC:
        for node in nodes:
            row = Row(traffic, _mode(node), _params(node), metric, node.packets[traffic], unit)
            smallest = value_of(rows, traffic, metric, datapath=node.datapath)
            rows.append(against(row, smallest, f"same at {SIZES[0]} services") if smallest else row)
    return rows


def _mode(node: Node) -> str:
    return next((datapath.mode for datapath in DATAPATHS if datapath.name == node.datapath), "none")


def _params(node: Node) -> dict[str, int | float | str]:
    return {"datapath": node.datapath} | ({"services": node.services} if node.services else {})
