"""``pod-attachment``: what it costs how a pod hangs on its node, in small packets from pod to pod over VXLAN.

    routed              a veth of its own, to which the node has a route: what nodeplane-cni does
    routed, rules       the same, with flannel's masquerade and forward rules: connections are tracked
    bridged             on the bridge cni0, whose packets no rule sees (bridge-nf-call-iptables 0)
    bridged, rules      on cni0 with br_netfilter and those rules: what flannel does

Every packet carries 64 bytes of UDP data and is sent as fast as the sender can. The tunnel is the same for all. Each way is a pair
of nodes of its own; all exist at the same time and are measured in turn, and a figure is the median of the half of the rounds in
which other programs took the least of the machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import msgspec

from bench.kernel import may_use_kernel
from bench.overlay_load import Flood, Generator, open_generator, quieter_half
from bench.overlay_nodes import bring, bring_links, peer_table
from bench.overlay_rig import End, Rig, attach_bridged, attach_routed, open_rig
from bench.result import Options, Row, against, median
from kernelstate.errors import KernelStateError
from kernelstate.linux import netns, sysctl
from kernelstate.linux.iptables import IptablesPort
from kernelstate.ownership import Ownership
from kernelstate.reconcile import NetfilterReconciler
from nodeplane.commands import Failed
from overlay.netconf import VxlanBackend
from overlay.render.masquerade import CHAIN_NAMES, render_masquerade
from overlay.render.vxlan import render_vxlan

ROUNDS = 15
FLOOD = 250
"""Milliseconds of one run."""
TARGET = 1.5
"""How many times as many packets routed is to carry as bridged with rules."""


class Attachment(msgspec.Struct, frozen=True):
    """A way to attach pods."""

    name: str
    bridged: bool
    rules: bool


ROUTED, BRIDGED_WITH_RULES = "routed", "bridged, rules"
ATTACHMENTS = (
    Attachment(ROUTED, bridged=False, rules=False),
    Attachment("routed, rules", bridged=False, rules=True),
    Attachment("bridged", bridged=True, rules=False),
    Attachment(BRIDGED_WITH_RULES, bridged=True, rules=True),
)


class Lane(msgspec.Struct):
    """One pair of nodes, and what every round found."""

    attachment: Attachment
    rig: Rig
    floods: list[Flood] = []


def measure(_options: Options, rounds: int = ROUNDS, flood: int = FLOOD) -> list[Row]:
    """Measure every way to attach pods. Raises Failed."""
    if not may_use_kernel():
        raise Failed("pod-attachment: making network namespaces needs root")
    try:
        with contextlib.ExitStack() as undo:
            generator = undo.enter_context(open_generator())
            lanes = [open_lane(generator, attachment, undo.enter_context(open_rig())) for attachment in ATTACHMENTS]
            for _ in range(rounds):
                for lane in lanes:
                    lane.floods.append(generator.flood(lane.rig, flood))
    except KernelStateError as error:
        raise Failed(f"pod-attachment: {error}") from error
    return _rows(lanes)


def open_lane(generator: Generator, attachment: Attachment, rig: Rig) -> Lane:
    """Lay VXLAN between two fresh nodes and attach their pods; see that packets of their MTU cross. Raises Failed."""
    mtu = 0
    for end in rig.ends:
        table = peer_table(end, rig, VxlanBackend())
        bring_links(end, render_vxlan(table))
        mtu = table.mtu
        netns.call(end.node, sysctl.write, "net.bridge.bridge-nf-call-iptables", int(attachment.rules))
        (attach_bridged if attachment.bridged else attach_routed)(end, mtu)
        if attachment.rules:
            write_rules(end, rig)
    generator.largest(rig, mtu)
    return Lane(attachment, rig)


def write_rules(end: End, rig: Rig) -> None:
    """Write flannel's masquerade and forward rules, as the agent does. Raises Failed."""
    netfilter = NetfilterReconciler(IptablesPort("legacy"), Ownership(frozenset(CHAIN_NAMES)))
    netfilter.set_desired(render_masquerade(peer_table(end, rig, VxlanBackend()), ip_masq=True), None, [4])
    bring(end, netfilter.sync)


CARRIED = "64-byte packets for a CPU second"

FIGURES: tuple[tuple[str, str, Callable[[Flood], float]], ...] = (
    (CARRIED, "thousands", lambda one: one.carried),
    ("64-byte packets", "kpps", lambda one: one.kpps),
    ("CPU for a 64-byte packet", "us", lambda one: one.cpu_per_packet),
    ("64-byte packets lost", "%", lambda one: one.lost),
)
"""Metric, unit, and the figure of one run; what is lost may be 0, and has no ratio."""


def _rows(lanes: Sequence[Lane]) -> list[Row]:
    """Return rows for each attachment with their ratio to bridged with rules, then the claim and the noise."""
    by_name = {lane.attachment.name: lane.floods for lane in lanes}
    reference = by_name[BRIDGED_WITH_RULES]
    rows = []
    for metric, unit, of in FIGURES:
        bare = _median(reference, of)
        for name, floods in by_name.items():
            row = Row(name, "vxlan", {}, metric, _median(floods, of), unit)
            rows.append(row if floods is reference or unit == "%" else against(row, bare, BRIDGED_WITH_RULES))
    pairs = quieter_half(list(zip(by_name[ROUTED], reference, strict=True)), lambda pair: pair[0].others + pair[1].others)
    claim = f"claim: {ROUTED} to {BRIDGED_WITH_RULES}"
    for metric, _, of in FIGURES[:2]:
        rows.append(
            Row(claim, "vxlan", {"at least": TARGET}, metric, median([of(one) / of(other) for one, other in pairs]), "times")
        )
    quiet = [quieter_half(floods, lambda one: one.others) for floods in by_name.values()]
    spread = max(max(one.kpps for one in floods) / median([one.kpps for one in floods]) for floods in quiet)
    rows.append(Row("noise", "vxlan", {}, "best round to median, at most", spread, "times"))
    others = median([one.others for floods in quiet for one in floods])
    return [*rows, Row("noise", "vxlan", {}, "CPUs taken by others, median", others, "")]


def _median(floods: Sequence[Flood], of: Callable[[Flood], float]) -> float:
    return median([of(one) for one in quieter_half(floods, lambda one: one.others)])
