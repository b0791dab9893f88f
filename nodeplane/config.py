"""The node's configuration: read once, checked once, every error naming the path and the value.

Two files are understood: our NodeConfiguration, and a plain KubeProxyConfiguration as kube-proxy reads it. Inside the first,
``services`` holds the second's fields, ``overlay`` flannel's net-conf.json fields and where the node's link is.

    apiVersion: nodeplane.dev/v1alpha1
    kind: NodeConfiguration
    nodeName: worker-1
    services: {mode: iptables, clusterCIDR: 10.244.0.0/16, nodePortAddresses: [primary]}
    overlay:  {Network: 10.244.0.0/16, Backend: {Type: vxlan}, iface: eth0, ipMasq: true}

Source: k8s.io/kube-proxy/config/v1alpha1, flannel Documentation/configuration.md.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from kernelstate.objects.address import Prefix
from netpolicy.render.denied import DeniedLog
from nodeplane.config_fields import ConfigError, Strict, decode_section, prefix_at, seconds_at
from nodeplane.config_node import (
    ConntrackOptions,
    LogOptions,
    ServerOptions,
    read_conntrack,
    read_logging,
    read_oom_score,
    read_servers,
)
from nodeplane.config_overlay import OverlayOptions, read_overlay
from proxy.modes import TRAITS
from proxy.settings import FlowFate, ProxySettings

MODES = ("iptables", "ipvs", "nftables", "ebpf")
"""Service modes there are."""


# -- KubeProxyConfiguration, field by field ----------------------------------------------------------------------------


class IptablesSection(Strict, frozen=True):
    """``iptables``: how rules are written and how often."""

    masquerade_bit: int | None = None
    masquerade_all: bool = False
    localhost_node_ports: bool | None = None
    sync_period: str | None = None
    min_sync_period: str | None = None


class IpvsSection(Strict, frozen=True):
    """``ipvs``: how virtual servers choose and what is left to others."""

    scheduler: str = ""
    exclude_cidrs: tuple[str, ...] = msgspec.field(default=(), name="excludeCIDRs")
    strict_arp: bool = msgspec.field(default=False, name="strictARP")
    tcp_timeout: str | None = None
    tcp_fin_timeout: str | None = None
    udp_timeout: str | None = None
    sync_period: str | None = None
    min_sync_period: str | None = None


class NftablesSection(Strict, frozen=True):
    """``nftables``: the mark and how often."""

    masquerade_bit: int | None = None
    masquerade_all: bool = False
    sync_period: str | None = None
    min_sync_period: str | None = None


class DetectLocalSection(Strict, frozen=True):
    """``detectLocal``: names for the two interface modes."""

    bridge_interface: str = ""
    interface_name_prefix: str = ""


class ConntrackSection(Strict, frozen=True):
    """``conntrack``: ``tcpBeLiberal`` decides a rule as well; all are sysctls."""

    max_per_core: int | None = None
    min: int | None = None
    tcp_established_timeout: str | None = None
    tcp_close_wait_timeout: str | None = None
    tcp_be_liberal: bool = False
    udp_timeout: str | None = None
    udp_stream_timeout: str | None = None


class ClientConnectionSection(Strict, frozen=True):
    """``clientConnection``: how the API server is reached."""

    kubeconfig: str = ""
    accept_content_types: str | None = None
    content_type: str | None = None
    qps: float | None = None
    burst: int | None = None


class ServicesSection(Strict, frozen=True):
    """KubeProxyConfiguration."""

    api_version: str = ""
    kind: str = ""
    mode: str = ""
    hostname_override: str = ""
    cluster_cidr: str = msgspec.field(default="", name="clusterCIDR")
    detect_local_mode: Literal["", "ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"] = ""
    detect_local: DetectLocalSection = DetectLocalSection()
    node_port_addresses: tuple[str, ...] | None = None
    iptables: IptablesSection = IptablesSection()
    ipvs: IpvsSection = IpvsSection()
    nftables: NftablesSection = NftablesSection()
    conntrack: ConntrackSection = ConntrackSection()
    client_connection: ClientConnectionSection = ClientConnectionSection()
    logging: dict[str, Any] | None = None
    bind_address: str | None = None
    healthz_bind_address: str | None = None
    metrics_bind_address: str | None = None
    bind_address_hard_fail: bool | None = None
    oom_score_adj: int | None = None
    # What follows is kube-proxy's and decides nothing in the modes there are; stating it is allowed and answered in the log.
    feature_gates: dict[str, bool] | None = None
    enable_profiling: bool | None = None
    show_hidden_metrics_for_version: str | None = None
    winkernel: dict[str, Any] | None = None
    config_sync_period: str | None = None
    port_range: str | None = None
    windows_run_as_service: bool | None = None


_UNUSED = [
    "feature_gates",
    "enable_profiling",
    "show_hidden_metrics_for_version",
    "winkernel",
    "config_sync_period",
    "port_range",
    "windows_run_as_service",
]
_UNUSED_CONNECTION = ["accept_content_types", "content_type", "qps", "burst"]


class ServiceOptions(Strict, frozen=True):
    """``serviceOptions``: what kube-proxy has no field for."""

    dispatch_above: int = 500
    guard_node_ports: bool = False
    scheduler_by_port: bool = False
    flows_to_removed_endpoints: FlowFate = "keep"
    drain_time: str | None = None
    cgroup: str = ""
    short_lane: bool = True
    short_openings: bool = True


class NodeConfig(msgspec.Struct, frozen=True):
    """Everything an agent needs to know besides the cluster's objects."""

    node_name: str
    services: ProxySettings | None = ProxySettings()
    """None: Services are left to somebody else."""
    mode: str = "iptables"
    min_sync_period: float | None = None
    """Seconds between the end of one write and the start of the next; None: it follows from how long a write takes (agent.py)."""
    sync_period: float = 30.0
    """Seconds between two full comparisons with the kernel."""
    overlay: OverlayOptions | None = None
    policy: str = ""
    """Through what NetworkPolicies are enforced, whatever the mode of Services is; empty: they are not."""
    policy_log: DeniedLog | None = None
    """How often a packet that policies deny is logged; None: never."""
    iptables_variant: Literal["auto", "legacy", "nft"] = "auto"
    cgroup: str = ""
    """Mode ``ebpf``: the cgroup of version 2 whose processes are the node's and its pods'; empty: all of the machine's."""
    short_lane: bool = False
    """Mode ``ebpf``: whether packets of open connections go from link to link without meeting the rules again."""
    short_openings: bool = False
    """Whether new connections of pods begin there as well, where no policy is about either end."""
    kubeconfig: str = ""
    """The file that says how to reach the API server, where the command line does not."""
    servers: ServerOptions = ServerOptions()
    conntrack: ConntrackOptions = ConntrackOptions()
    logs: LogOptions = LogOptions()
    oom_score: int | None = None
    """How readily the kernel ends the agent when memory runs out, -1000 to 1000; None: as it was started."""
    notes: tuple[str, ...] = ()
    """Fields that were stated and change nothing here: one line each for the log."""


def default_config(node_name: str, mode: str = "iptables") -> NodeConfig:
    """Return the configuration of a file that states nothing but the mode."""
    return _build({"nodeName": node_name}, ServicesSection(mode=_mode(mode, "--mode")), "services.", node_name)


def load_config(path: Path, node_name: str = "", mode: str = "") -> NodeConfig:
    """Read a configuration file. ``node_name`` and ``mode`` from the command line beat the file. Raises ConfigError."""
    try:
        raw = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        return parse_config(raw, node_name, mode)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_config(raw: object, node_name: str = "", mode: str = "") -> NodeConfig:
    """Check a decoded configuration file. Raises ConfigError naming path and value."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"must be a NodeConfiguration or a KubeProxyConfiguration, is {type(raw).__name__}")
    stated: dict[str, Any] = {"mode": _mode(mode, "--mode")} if mode else {}
    match raw.get("kind"):
        case "KubeProxyConfiguration":
            section = decode_section({**raw, **stated}, ServicesSection, "")
            return _build({"nodeName": section.hostname_override}, section, "", node_name)
        case "NodeConfiguration":
            if raw.get("apiVersion") != "nodeplane.dev/v1alpha1":
                raise ConfigError(f"apiVersion: must be nodeplane.dev/v1alpha1, is {raw.get('apiVersion')!r}")
            known = {"apiVersion", "kind", "nodeName", "services", "serviceOptions", "overlay", "policy", "iptablesVariant"}
            for key in raw:
                if key not in known:
                    raise ConfigError(f"{key}: unknown field; there are {', '.join(sorted(known))}")
            services = raw.get("services") or {}
            services = {**services, **stated} if isinstance(services, Mapping) else services
            section = decode_section(services, ServicesSection, "services")
            return _build(raw, section, "services.", node_name)
        case kind:
            raise ConfigError(f"kind: must be NodeConfiguration or KubeProxyConfiguration, is {kind!r}")


def _build(raw: Mapping[str, Any], section: ServicesSection, at: str, node_name: str) -> NodeConfig:
    variant = raw.get("iptablesVariant", "auto")
    if variant not in {"auto", "legacy", "nft"}:
        raise ConfigError(f"iptablesVariant: must be auto, legacy or nft, is {variant!r}")
    name = node_name or raw.get("nodeName") or section.hostname_override or socket.gethostname()
    if not isinstance(name, str):
        raise ConfigError(f"nodeName: must be a string, is {name!r}")
    mode = _mode(section.mode, f"{at}mode")
    minimum, sync = _periods(section, mode, at)
    overlay = raw.get("overlay")
    overlay_options = read_overlay(overlay) if overlay is not None else None
    options = decode_section(raw.get("serviceOptions") or {}, ServiceOptions, "serviceOptions")
    policy, policy_log = _policy(raw.get("policy") or {}, mode, f"{at}mode")
    return NodeConfig(
        node_name=name.lower(),
        services=None if raw.get("services", {}) is False else _proxy_settings(section, options, mode, at),
        mode=mode,
        min_sync_period=minimum,
        sync_period=sync,
        overlay=overlay_options,
        policy=policy,
        policy_log=policy_log,
        iptables_variant=variant,
        cgroup=_cgroup(options.cgroup, mode),
        short_lane=options.short_lane and mode == "ebpf",
        short_openings=options.short_lane and options.short_openings and mode == "ebpf",
        kubeconfig=section.client_connection.kubeconfig,
        servers=read_servers(section, at),
        conntrack=read_conntrack(section.conntrack, at),
        logs=read_logging(section.logging, at),
        oom_score=read_oom_score(section.oom_score_adj, at),
        notes=_notes(section, at) + (overlay_options.notes if overlay_options else ()),
    )


def _periods(section: ServicesSection, mode: str, at: str) -> tuple[float | None, float]:
    """Return minSyncPeriod, if it is known, and syncPeriod in seconds, from the section of the mode."""
    periods: dict[str, IptablesSection | IpvsSection | NftablesSection] = {
        "iptables": section.iptables,
        "ipvs": section.ipvs,
        "nftables": section.nftables,
        "ebpf": section.nftables,  # the rules beneath are that mode's, and so are the options
    }
    at += "nftables" if mode == "ebpf" else mode
    stated = periods[mode]
    sync = seconds_at(stated.sync_period, 30.0, f"{at}.syncPeriod")
    minimum = 0.0 if mode == "ipvs" else None
    if stated.min_sync_period is not None:
        minimum = seconds_at(stated.min_sync_period, 0.0, f"{at}.minSyncPeriod")
    if sync <= 0:
        raise ConfigError(f"{at}.syncPeriod: must be greater than 0, is {stated.sync_period}")
    if minimum is not None and minimum > sync:
        raise ConfigError(f"{at}.minSyncPeriod: must not be greater than syncPeriod, is {minimum:g} s")
    return minimum, sync


def _proxy_settings(section: ServicesSection, options: ServiceOptions, mode: str, at: str) -> ProxySettings:
    """Check what decides meaning or rules. As in kube-proxy, ``ipvs`` takes mark and masqueradeAll from ``iptables``."""
    through_nftables = mode in {"nftables", "ebpf"}
    own = section.nftables if through_nftables else section.iptables
    at_own = f"{at}nftables" if through_nftables else f"{at}iptables"
    bit = 14 if own.masquerade_bit is None else own.masquerade_bit
    if not 0 <= bit <= 31:
        raise ConfigError(f"{at_own}.masqueradeBit: must be between 0 and 31, is {bit}")
    detect_mode = section.detect_local_mode or "ClusterCIDR"
    detect = section.detect_local
    if detect_mode == "BridgeInterface" and not detect.bridge_interface:
        raise ConfigError(f"{at}detectLocal.bridgeInterface: must be set with detectLocalMode BridgeInterface")
    if detect_mode == "InterfaceNamePrefix" and not detect.interface_name_prefix:
        raise ConfigError(f"{at}detectLocal.interfaceNamePrefix: must be set with detectLocalMode InterfaceNamePrefix")
    if options.dispatch_above < 0:
        raise ConfigError(f"serviceOptions.dispatchAbove: must not be negative, is {options.dispatch_above}")
    cidrs = [c.strip() for c in section.cluster_cidr.split(",") if c.strip()]
    localhost = section.iptables.localhost_node_ports
    ipvs = section.ipvs
    return ProxySettings(
        masquerade_all=own.masquerade_all,
        masquerade_bit=bit,
        localhost_node_ports=(TRAITS[mode].localhost_node_ports or TRAITS[mode].asks_sockets) and localhost is not False,
        detect_local_mode=detect_mode,
        cluster_cidrs=tuple(prefix_at(c, f"{at}clusterCIDR") for c in cidrs),
        bridge_interface=detect.bridge_interface,
        interface_name_prefix=detect.interface_name_prefix,
        node_port_addresses=_node_port_addresses(section.node_port_addresses, mode, at),
        tcp_be_liberal=section.conntrack.tcp_be_liberal,
        dispatch_above=options.dispatch_above,
        scheduler=_scheduler(ipvs.scheduler, f"{at}ipvs.scheduler"),
        scheduler_by_port=options.scheduler_by_port,
        ipvs_timeouts=(
            _whole_seconds(ipvs.tcp_timeout, f"{at}ipvs.tcpTimeout"),
            _whole_seconds(ipvs.tcp_fin_timeout, f"{at}ipvs.tcpFinTimeout"),
            _whole_seconds(ipvs.udp_timeout, f"{at}ipvs.udpTimeout"),
        ),
        strict_arp=ipvs.strict_arp,
        exclude_cidrs=tuple(prefix_at(c, f"{at}ipvs.excludeCIDRs[{i}]") for i, c in enumerate(ipvs.exclude_cidrs)),
        guard_node_ports=options.guard_node_ports,
        flows_to_removed=options.flows_to_removed_endpoints,
        drain_seconds=_whole_seconds(options.drain_time, "serviceOptions.drainTime", 30),
    )


def _cgroup(stated: str, mode: str) -> str:
    if stated and not stated.startswith("/"):
        raise ConfigError(f"serviceOptions.cgroup: must be an absolute path, is {stated!r}")
    return stated if mode == "ebpf" else ""


def _scheduler(stated: str, at: str) -> str:
    """Check the shape of a scheduler's name; whether the kernel has it is the kernel's to say."""
    if not re.fullmatch(r"[a-z0-9_-]{0,15}", stated):
        raise ConfigError(f"{at}: must be the name of an IPVS scheduler such as rr, lc or mh, is {stated!r}")
    return stated or "rr"


def _whole_seconds(text: str | None, at: str, default: int = 0) -> int:
    seconds = seconds_at(text, float(default), at)
    if seconds != int(seconds):
        raise ConfigError(f"{at}: must be whole seconds, is {text!r}")
    return int(seconds)


def _node_port_addresses(stated: tuple[str, ...] | None, mode: str, at: str) -> tuple[Prefix, ...] | Literal["primary"]:
    if not stated:
        return "primary" if TRAITS[mode].primary_node_ports else ()
    if "primary" in stated:
        if len(stated) > 1:
            raise ConfigError(f"{at}nodePortAddresses: primary stands alone or not at all, is {list(stated)}")
        return "primary"
    return tuple(prefix_at(c, f"{at}nodePortAddresses[{i}]") for i, c in enumerate(stated))


class PolicySection(Strict, frozen=True):
    """``policy``: whether NetworkPolicies are enforced here, and through what."""

    enabled: bool = False
    mode: str = "nftables"
    log_denied: bool = False
    log_per_second: int = DeniedLog().per_second


MOST_LOGGED = 1000
"""Lines a second; one is some tens of microseconds of the agent's time."""
POLICY_MODES = ("nftables", "iptables")
"""Through what policies can be enforced."""


def _policy(raw: object, mode: str, at: str) -> tuple[str, DeniedLog | None]:
    """Return through what NetworkPolicies are enforced, empty if they are not, and what is logged; ``mode`` is that of Services."""
    section = decode_section(raw, PolicySection, "policy")
    if section.mode not in POLICY_MODES:
        raise ConfigError(f"policy.mode: must be {' or '.join(POLICY_MODES)}, is {section.mode!r}")
    if section.enabled and section.mode == "iptables" and mode == "ipvs":
        # A packet to a virtual server passes INPUT with the Service's address; iptables has no hook for it behind IPVS.
        raise ConfigError(f"policy.mode: iptables cannot judge what {at} ipvs sends to Services; nftables can")
    if not 1 <= section.log_per_second <= MOST_LOGGED:
        raise ConfigError(f"policy.logPerSecond: must be between 1 and {MOST_LOGGED}, is {section.log_per_second}")
    log = DeniedLog(section.log_per_second, 2 * section.log_per_second) if section.log_denied else None
    return (section.mode, log) if section.enabled else ("", None)


def _mode(stated: str, at: str) -> str:
    mode = stated or "iptables"
    if mode not in MODES:
        raise ConfigError(f"{at}: must be one of {', '.join(MODES)}, is {mode!r}")
    return mode


def _notes(section: ServicesSection, at: str) -> tuple[str, ...]:
    """Name the fields that were stated and have no effect here, so that nobody waits for one."""
    stated = [name for name in _UNUSED if getattr(section, name) is not None]
    connection = [name for name in _UNUSED_CONNECTION if getattr(section.client_connection, name) is not None]
    paths = [
        *(_camel(name) for name in stated),
        *(f"clientConnection.{_camel(name)}" for name in connection),
    ]
    return tuple(f"{at}{path} is stated and changes nothing in this version" for path in paths)


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)
