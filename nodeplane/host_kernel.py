"""The reconcilers of this machine, chosen by mode and by what its kernel has. Impure by purpose, and small.

What only other modes use is handed over as retired: it is emptied once this mode is in place. Modules of a mode are imported
where it is used: an agent carries no other mode's code.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kernelstate.diff_ipvs import IpvsOwnership
from kernelstate.errors import KernelStateError, MissingFeatureError
from kernelstate.features import Feature
from kernelstate.linux.addresses import Addresses
from kernelstate.linux.forwarder import LinuxForwarder
from kernelstate.linux.iptables import IptablesPort, Variant, choose_variant, families, is_available
from kernelstate.linux.links import LinuxLinks
from kernelstate.ownership import Ownership
from kernelstate.ports import Reconciler
from kernelstate.reconcile import NetfilterReconciler
from kernelstate.reconcile_forwarder import ForwarderReconciler
from kernelstate.reconcile_links import LinkReconciler
from kernelstate.reconcile_nftables import NftablesReconciler
from nodeplane.config import NodeConfig
from nodeplane.kernel import IpvsParts, NodeKernel, TunnelParts
from nodeplane.pipeline import OWNERSHIP
from nodeplane.tunnel_engine import Choice, choose_engine
from overlay.netconf import UdpBackend
from overlay.render.masquerade_nftables import NAMES
from proxy.render.ipvs_program import LINK
from proxy.settings import ProxySettings

if TYPE_CHECKING:
    from kernelstate.linux.bpf_lane import LinuxLane
    from kernelstate.linux.ebpf_services import LinuxServiceMaps
    from kernelstate.reconcile_ebpf import SocketReconciler
    from kernelstate.reconcile_lane import LaneReconciler
    from kernelstate.reconcile_sets import IpsetReconciler
    from kernelstate.reconcile_tunnel import TunnelReconciler

BUILT = Path(__file__).resolve().parent.parent / "packetpath/built"
"""What was made of the C at installation."""
FORWARDER = BUILT / "nodeplane-udp"
VARIANTS: tuple[Variant, ...] = ("legacy", "nft")
THROUGH_NFTABLES = ("nftables", "ebpf")
"""Modes with a table of nftables."""


class HostKernel(msgspec.Struct, frozen=True):
    """The kernel's parts, and what was decided about them."""

    kernel: NodeKernel
    iptables_variant: Variant
    iptables_reason: str
    watched: tuple[int, ...]
    """Descriptors that become readable when a part may have drifted."""
    engine: Choice | None = None
    """Who wraps packets in UDP; None for other backends."""
    unguarded: str = ""
    """Why sources of packets are not checked though they should be."""
    unasked: str = ""
    """Why sockets are not told of Services though they should be."""
    laneless: str = ""
    """Why packets of open connections take no short lane though they should."""


def host_kernel(config: NodeConfig, chains: int, forwarder: LinuxForwarder | None = None) -> HostKernel:
    """Put together the parts for the current network namespace, in which about ``chains`` iptables chains will be.

    ``forwarder`` None: the one that was installed with us, its socket where the others of the node are. Raises MissingFeatureError when the kernel lacks what the mode needs.
    """
    variant, reason = _variant(config, chains)
    links = LinuxLinks() if config.overlay else None
    nftables = _nftables() if config.mode in THROUGH_NFTABLES else None
    at_sockets, unasked = _sockets(config) if config.mode == "ebpf" else (None, "")
    in_lane, laneless = _lane(config) if config.short_lane else (None, "")
    sockets = _tables(at_sockets, in_lane if config.short_openings else None)
    lane = _lane_reconciler(in_lane) if in_lane is not None else None
    tables = overlay_tables() if config.overlay and config.overlay.net_conf.nftables else None
    policies: NftablesReconciler | IpsetReconciler | None = None
    if config.policy:
        policies = policy_tables() if config.policy == "nftables" else policy_sets()
    forwarder = forwarder or LinuxForwarder(FORWARDER)
    # As long as etcd has not said what the network is, nobody knows which of these an earlier agent needed.
    is_known = config.overlay is None or bool(config.overlay.net_conf.families)
    backend = config.overlay.net_conf.backend if config.overlay else None
    engine = _engine(backend) if isinstance(backend, UdpBackend) else None
    has_udp = engine is not None
    checks = is_known and config.overlay is not None and config.overlay.source_check
    unguarded = _unloadable("guard") if checks else ""
    programs = tunnel_programs() if is_known else None
    tunnel = None
    if programs is not None and config.overlay is not None:
        tunnel = TunnelParts(programs, engine is not None and engine.engine == "kernel", checks and not unguarded)
    watched = [part.fileno() for part in (links, nftables, tables, forwarder if has_udp else None) if part is not None]
    if isinstance(policies, NftablesReconciler):
        watched.append(policies.fileno())
    ipvs = None
    if config.mode == "ipvs":
        ipvs, descriptor = _ipvs(config.services or ProxySettings())
        watched.append(descriptor)
    kernel = NodeKernel(
        NetfilterReconciler(IptablesPort(variant), OWNERSHIP),
        links=LinkReconciler(links) if links else None,
        forwarder=ForwarderReconciler(forwarder) if has_udp else None,
        tunnel=tunnel,
        overlay_tables=tables,
        policies=policies,
        nftables=nftables,
        ipvs=ipvs,
        sockets=sockets,
        lane=lane,
        families=families(),
        retired=[
            *_other_variants(variant),
            *other_modes(config.mode, config.services),
            *(leftovers_of_sockets() if at_sockets is None else []),
            *([left] if lane is None and (left := leftover_lane()) is not None else []),
            *([overlay_tables()] if is_known and tables is None else []),
            *([policy_tables()] if config.policy != "nftables" else []),
            *(_leftovers_of_sets() if config.policy != "iptables" else []),
            *([ForwarderReconciler(forwarder)] if is_known and not has_udp else []),
            *([programs] if programs is not None and tunnel is None else []),
        ],
    )
    return HostKernel(kernel, variant, reason, tuple(watched), engine, unguarded, unasked, laneless)


def tunnel_programs() -> TunnelReconciler | None:
    """Return what keeps the kernel's programs at the tunnel and the uplink; None where there is no library to speak to them."""
    from kernelstate.linux.bpf_tunnel import LinuxTunnel  # noqa: PLC0415
    from kernelstate.reconcile_tunnel import TunnelReconciler  # noqa: PLC0415

    try:
        return TunnelReconciler(LinuxTunnel(BUILT))
    except MissingFeatureError:
        return None


def _engine(backend: UdpBackend) -> Choice:
    return choose_engine(backend.engine, "" if backend.engine == "userspace" else _unloadable("udp"))


def _unloadable(name: str) -> str:
    """Say why this kernel does not take a program of ours, by loading it; empty if it does."""
    from kernelstate.linux.libbpf import BpfObject  # noqa: PLC0415

    try:
        with BpfObject(BUILT / f"{name}.bpf.o"):
            return ""
    except KernelStateError as error:
        return str(error)


def _variant(config: NodeConfig, chains: int) -> tuple[Variant, str]:
    if config.iptables_variant != "auto":
        return config.iptables_variant, "iptablesVariant in the configuration"
    return choose_variant(chains if config.mode == "iptables" else 0)


def _other_variants(variant: Variant) -> list[Reconciler]:
    found = [v for v in VARIANTS if v != variant and is_available(v)]
    return [NetfilterReconciler(IptablesPort(v), OWNERSHIP, families()) for v in found]


def other_modes(mode: str, settings: ProxySettings | None) -> list[Reconciler]:
    """Return the parts besides rules that ``mode`` does not use and another may have left; "" for all of them."""
    found: list[Reconciler] = []
    if mode not in THROUGH_NFTABLES:
        found.append(_nftables())
    if mode != "ipvs":
        found += _leftovers_of_ipvs(settings)
    return found


def overlay_tables() -> NftablesReconciler:
    """Return what keeps the overlay's rules in nftables."""
    from kernelstate.linux.nftables import NftablesPort  # noqa: PLC0415

    return NftablesReconciler(NftablesPort(), NAMES, "overlay rules")


def policy_tables() -> NftablesReconciler:
    """Return what keeps NetworkPolicies in nftables."""
    from kernelstate.linux.nftables import NftablesPort  # noqa: PLC0415
    from netpolicy.render.nftables import NAMES as POLICY_NAMES  # noqa: PLC0415

    return NftablesReconciler(NftablesPort(), POLICY_NAMES, "policies", in_turn=True)


def policy_sets() -> IpsetReconciler:
    """Return what keeps the sets that policies in iptables ask. Raises MissingFeatureError."""
    from kernelstate.linux.ipset import LinuxIpset, has_ipset  # noqa: PLC0415
    from kernelstate.reconcile_sets import IpsetReconciler  # noqa: PLC0415
    from netpolicy.render.iptables import DENIED, ISOLATED, PREFIXES  # noqa: PLC0415

    if not has_ipset():
        raise MissingFeatureError(Feature.IPSET)
    return IpsetReconciler(LinuxIpset(), Ownership(prefixes=(ISOLATED, *DENIED.values(), *PREFIXES)), "policies")


def _leftovers_of_sets() -> list[Reconciler]:
    """Return what destroys the sets of policies, where there can be any."""
    try:
        return [policy_sets()]
    except MissingFeatureError:
        return []


def _nftables() -> NftablesReconciler:
    from kernelstate.linux.nftables import NftablesPort  # noqa: PLC0415

    return NftablesReconciler(NftablesPort())


def _sockets(config: NodeConfig) -> tuple[LinuxServiceMaps | None, str]:
    """Return the programs at sockets, or why there cannot be any: then packets meet the lane or the rules."""
    from kernelstate.linux.ebpf_services import LinuxServiceMaps, node_cgroup, unloadable  # noqa: PLC0415

    try:
        port = LinuxServiceMaps(BUILT, node_cgroup(config.cgroup))
    except KernelStateError as error:
        return None, str(error)
    why = unloadable(BUILT)
    return (None, why) if why else (port, "")


def _lane(config: NodeConfig) -> tuple[LinuxLane | None, str]:
    """Return the short lane's program, or why there cannot be any."""
    from kernelstate.linux.bpf_lane import LinuxLane, unloadable  # noqa: PLC0415

    try:
        port = LinuxLane(BUILT, opens=config.short_openings)
    except MissingFeatureError as error:
        return None, str(error)
    why = unloadable(BUILT)
    return (None, why) if why else (port, "")


def _tables(sockets: LinuxServiceMaps | None, lane: LinuxLane | None) -> SocketReconciler | None:
    """Return what keeps tables of Services wherever somebody asks them; None if nobody does."""
    from kernelstate.linux.packet_tables import PacketTables  # noqa: PLC0415
    from kernelstate.reconcile_ebpf import ServiceMapsPort, SocketReconciler  # noqa: PLC0415
    from kernelstate.several_maps import SeveralMaps  # noqa: PLC0415

    ports: list[ServiceMapsPort] = [sockets] if sockets is not None else []
    if lane is not None:
        ports.append(PacketTables(lane))
    return SocketReconciler(SeveralMaps(ports) if len(ports) > 1 else ports[0], time.monotonic) if ports else None


def _lane_reconciler(port: LinuxLane) -> LaneReconciler:
    from kernelstate.reconcile_lane import LaneReconciler  # noqa: PLC0415

    return LaneReconciler(port)


def leftover_lane() -> LaneReconciler | None:
    """Return what takes the short lane's programs off; None where there cannot be any."""
    from kernelstate.linux.bpf_lane import LinuxLane  # noqa: PLC0415

    try:
        return _lane_reconciler(LinuxLane(BUILT))
    except MissingFeatureError:
        return None


def leftovers_of_sockets() -> list[Reconciler]:
    """Return what takes this node's programs off all sockets, where there can be any."""
    from kernelstate.linux import cgroups  # noqa: PLC0415
    from kernelstate.linux.ebpf_services import LinuxServiceMaps  # noqa: PLC0415
    from kernelstate.reconcile_ebpf import SocketReconciler  # noqa: PLC0415

    found = cgroups.mounted()
    try:
        return [SocketReconciler(LinuxServiceMaps(BUILT, found[0]), time.monotonic)] if found else []
    except MissingFeatureError:
        return []


def _ipvs(settings: ProxySettings) -> tuple[IpvsParts, int]:
    """Return the parts of mode ``ipvs``, and the descriptor of address events. Raises MissingFeatureError."""
    from kernelstate.linux.ipset import LinuxIpset, has_ipset  # noqa: PLC0415
    from kernelstate.linux.ipvs import LinuxIpvs, load_scheduler  # noqa: PLC0415
    from kernelstate.linux.service_addresses import LinuxServiceAddresses  # noqa: PLC0415
    from kernelstate.reconcile_addresses import AddressReconciler  # noqa: PLC0415
    from kernelstate.reconcile_ipvs import IpvsReconciler  # noqa: PLC0415
    from kernelstate.reconcile_sets import IpsetReconciler  # noqa: PLC0415
    from proxy.render.ipvs import CONSISTENT  # noqa: PLC0415

    servers = LinuxIpvs()
    if not has_ipset():
        raise MissingFeatureError(Feature.IPSET)
    for scheduler in sorted({settings.scheduler, CONSISTENT}):
        load_scheduler(scheduler)
    servers.set_timeouts(*settings.ipvs_timeouts)
    link = LinuxServiceAddresses(LINK)
    addresses = AddressReconciler(link)
    fates = {"keep": None, "drain": float(settings.drain_seconds), "reset": 0.0}
    parts = IpvsParts(
        IpsetReconciler(LinuxIpset(), _set_ownership()),
        IpvsReconciler(servers, addresses.addresses, drain_seconds=fates[settings.flows_to_removed]),
        addresses,
    )
    return parts, link.fileno()


def _leftovers_of_ipvs(settings: ProxySettings | None) -> list[Reconciler]:
    """Return what empties virtual servers, sets and the link; asks nothing that would make the kernel load IPVS."""
    from kernelstate.linux.ipset import LinuxIpset, has_ipset  # noqa: PLC0415
    from kernelstate.linux.service_addresses import LinuxServiceAddresses  # noqa: PLC0415
    from kernelstate.reconcile_addresses import AddressReconciler  # noqa: PLC0415
    from kernelstate.reconcile_sets import IpsetReconciler  # noqa: PLC0415

    addresses = AddressReconciler(LinuxServiceAddresses(LINK))
    found: list[Reconciler] = []
    if Path("/proc/thread-self/net/ip_vs").exists():
        from kernelstate.linux.ipvs import LinuxIpvs  # noqa: PLC0415
        from kernelstate.reconcile_ipvs import IpvsReconciler  # noqa: PLC0415

        servers = IpvsReconciler(LinuxIpvs(), addresses.addresses)
        own = frozenset(p for link, p in Addresses().local_addresses() if link not in {"lo", LINK})
        servers.set_desired({}, None, IpvsOwnership(own, excluded=settings.exclude_cidrs if settings else ()))
        found.append(servers)
    found.append(addresses)
    if has_ipset():
        found.append(IpsetReconciler(LinuxIpset(), _set_ownership()))
    return found


def _set_ownership() -> Ownership:
    from kernelstate.diff_sets import TEMPORARY  # noqa: PLC0415
    from proxy.render.ipvs import SET_TYPES, set_name  # noqa: PLC0415

    return Ownership(frozenset(set_name(n, f) for n in SET_TYPES for f in (4, 6)), (TEMPORARY,))
