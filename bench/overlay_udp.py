"""The udp backend's two engines, and the plain loop that they are compared with: the same packets on the wire.

    pod --> route Network dev flannel0 --> TUN --> forwarder --> UDP 8285 --> ... --> forwarder --> TUN --> pod      userspace
                                            '-- program of the kernel --> UDP 8285 --> ... --> program --> pod       kernel

The forwarder is started by the same code as the agent's, from ``packetpath/built``.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from bench.overlay_load import compile_c, last_words
from bench.overlay_nodes import Programmed, Way, bring, bring_links, bring_programs, missing_programs, peer_table
from bench.overlay_rig import NETWORK, UNDERLAY_MTU, End, Rig, batch
from kernelstate.linux import netns
from kernelstate.linux.forwarder import LinuxForwarder
from kernelstate.linux.forwarder_control import Control
from kernelstate.objects.tunnel import TunnelState
from kernelstate.reconcile_forwarder import ForwarderReconciler
from kernelstate.tunnel_tables import Kind
from nodeplane.commands import Failed
from nodeplane.host_kernel import FORWARDER
from overlay.mtu import UDP_OVERHEAD
from overlay.netconf import Engine, UdpBackend
from overlay.render.guard import render_guard
from overlay.render.udp import LINK, render_udp, render_udp_tunnel
from overlay.table import PeerTable

USERSPACE, KERNEL, LOOP = "udp userspace", "udp kernel", "plain loop"
PORT = UdpBackend().port
LOOP_SOURCE = Path(__file__).parent / "baseline" / "flannel_loop.c"


def _userspace(undo: contextlib.ExitStack, rig: Rig) -> Programmed:
    return _udp(undo, rig, "userspace")


def _kernel(undo: contextlib.ExitStack, rig: Rig) -> Programmed:
    return _udp(undo, rig, "kernel")


def _udp(undo: contextlib.ExitStack, rig: Rig, engine: Engine) -> Programmed:
    tables = [peer_table(end, rig, UdpBackend(engine=engine)) for end in rig.ends]
    running: list[int] = []
    counters: list[Callable[[], Mapping[str, int]]] = []
    for end, table in zip(rig.ends, tables, strict=True):
        forwarder = _forward(undo, end, table)
        running.append(_pid(forwarder))
        counters.append(forwarder.counters)
        tunnel = render_udp_tunnel(table) if engine == "kernel" else None
        programs = bring_programs(undo, end, TunnelState(tunnel, render_guard(table)))
        if programs is not None:
            kinds: Sequence[Kind] = ("udp", "guard")
            counters += [partial(programs.counters, kind) for kind in kinds]
    return Programmed(tables[0].mtu, tuple(running), lambda: _sum(read() for read in counters))


def _forward(undo: contextlib.ExitStack, end: End, table: PeerTable) -> LinuxForwarder:
    """Make the TUN and start the forwarder behind it."""
    directory = undo.enter_context(tempfile.TemporaryDirectory(prefix="nodeplane-bench-"))
    forwarder = LinuxForwarder(FORWARDER, Path(directory))
    undo.callback(forwarder.close)
    reconciler = ForwarderReconciler(forwarder)
    undo.callback(bring, end, reconciler.cleanup)
    bring_links(end, render_udp(table))
    reconciler.set_desired(render_udp_tunnel(table))
    bring(end, reconciler.sync)
    return forwarder


def _pid(forwarder: LinuxForwarder) -> int:
    with Control(forwarder.socket) as control:
        return control.listener


def _sum(counters: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
    total: Counter[str] = Counter()
    for one in counters:
        total.update(one)
    return total


def _lacking_forwarder() -> str:
    return "" if FORWARDER.exists() else f"{FORWARDER} was not built"


# -- the plain loop ----------------------------------------------------------------------------------------------------


def _loop(undo: contextlib.ExitStack, rig: Rig) -> Programmed:
    directory = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="nodeplane-bench-")))
    program = compile_c(LOOP_SOURCE, directory / LOOP_SOURCE.stem)
    mtu = UNDERLAY_MTU - UDP_OVERHEAD[4]
    running = []
    for end, other in (rig.ends, rig.ends[::-1]):
        words = [LINK, str(PORT), end.node_ip, other.pod_cidr, other.node_ip]
        pipe = subprocess.PIPE
        process = undo.enter_context(netns.popen(end.node, [str(program), *words], stdout=pipe, stderr=pipe, text=True))
        undo.callback(process.terminate)
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise Failed(last_words(process, LOOP_SOURCE.stem))
        address = end.pod_cidr.replace("/24", "/32")
        batch(end.node, f"link set {LINK} mtu {mtu} up", f"addr add {address} dev {LINK}", f"route add {NETWORK} dev {LINK}")
        running.append(process.pid)
    return Programmed(mtu, tuple(running))


def _lacking_programs() -> str:
    return _lacking_forwarder() or missing_programs()


UDP_WAYS: Sequence[Way] = (
    Way(USERSPACE, _userspace, _lacking_forwarder),
    Way(KERNEL, _kernel, _lacking_programs),
    Way(LOOP, _loop),
)
