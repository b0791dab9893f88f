"""kube-proxy's command line: which of its flags say what here, and what takes precedence.

    --config F              the file says it all, as with kube-proxy: of the flags below only those of logging and the node's name
                            count beside it, the others are named in the log and ignored
    no --config             flags become a KubeProxyConfiguration, checked as a file of that kind is

``--kubeconfig`` and ``--objects`` say where objects come from and always count. A flag of kube-proxy that means nothing here is accepted
and answered in the log with the reason; one that would ask for something else than an agent is refused. As in kube-proxy the flags named
``iptables`` and ``masquerade`` count for mode nftables too. Source: kube-proxy 1.36 cmd/kube-proxy/app/options.go.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from nodeplane.commands import Usage
from nodeplane.config import NodeConfig, load_config, parse_config
from nodeplane.config_fields import ConfigError
from nodeplane.config_node import LogOptions


class Flag(NamedTuple):
    """One flag: its name, the field of KubeProxyConfiguration it states, and what may follow it."""

    name: str
    path: str
    kind: Literal["text", "number", "switch", "list"] = "text"

    @property
    def dest(self) -> str:
        """The name under which the parser leaves its value."""
        return f"flag_{self.name.replace('-', '_')}"


FLAGS = (
    Flag("proxy-mode", "mode"),
    Flag("cluster-cidr", "clusterCIDR"),
    Flag("detect-local-mode", "detectLocalMode"),
    Flag("pod-bridge-interface", "detectLocal.bridgeInterface"),
    Flag("pod-interface-name-prefix", "detectLocal.interfaceNamePrefix"),
    Flag("nodeport-addresses", "nodePortAddresses", "list"),
    Flag("masquerade-all", "iptables.masqueradeAll", "switch"),
    Flag("iptables-masquerade-bit", "iptables.masqueradeBit", "number"),
    Flag("iptables-localhost-nodeports", "iptables.localhostNodePorts", "switch"),
    Flag("iptables-sync-period", "iptables.syncPeriod"),
    Flag("iptables-min-sync-period", "iptables.minSyncPeriod"),
    Flag("ipvs-sync-period", "ipvs.syncPeriod"),
    Flag("ipvs-min-sync-period", "ipvs.minSyncPeriod"),
    Flag("ipvs-scheduler", "ipvs.scheduler"),
    Flag("ipvs-exclude-cidrs", "ipvs.excludeCIDRs", "list"),
    Flag("ipvs-strict-arp", "ipvs.strictARP", "switch"),
    Flag("ipvs-tcp-timeout", "ipvs.tcpTimeout"),
    Flag("ipvs-tcpfin-timeout", "ipvs.tcpFinTimeout"),
    Flag("ipvs-udp-timeout", "ipvs.udpTimeout"),
    Flag("bind-address", "bindAddress"),
    Flag("healthz-bind-address", "healthzBindAddress"),
    Flag("metrics-bind-address", "metricsBindAddress"),
    Flag("bind-address-hard-fail", "bindAddressHardFail", "switch"),
    Flag("oom-score-adj", "oomScoreAdj", "number"),
    Flag("conntrack-max-per-core", "conntrack.maxPerCore", "number"),
    Flag("conntrack-min", "conntrack.min", "number"),
    Flag("conntrack-tcp-timeout-established", "conntrack.tcpEstablishedTimeout"),
    Flag("conntrack-tcp-timeout-close-wait", "conntrack.tcpCloseWaitTimeout"),
    Flag("conntrack-tcp-be-liberal", "conntrack.tcpBeLiberal", "switch"),
    Flag("conntrack-udp-timeout", "conntrack.udpTimeout"),
    Flag("conntrack-udp-timeout-stream", "conntrack.udpStreamTimeout"),
)
SHARED = ("masqueradeAll", "masqueradeBit", "syncPeriod", "minSyncPeriod")
"""Fields of ``iptables`` that their flags state for ``nftables`` too."""

_CONNECTION = "one list and one watch of each kind need no throttling, and speak JSON"
UNUSED: Mapping[str, str] = {
    "feature-gates": "nothing here hides behind a gate",
    "kube-api-content-type": _CONNECTION,
    "kube-api-burst": _CONNECTION,
    "kube-api-qps": _CONNECTION,
    "profiling": "there is no profile of Go to be had",
    "show-hidden-metrics-for-version": "no metrics are hidden",
    "config-sync-period": "objects are watched, and listed anew only when history is lost",
    "vmodule": "loggers have no levels of their own",
    "log-flush-frequency": "every line is written at once",
}
"""Flags that change nothing, and why."""
REFUSED: Mapping[str, str] = {
    "cleanup": "is a command of its own: nodeplane cleanup",
    "write-config-to": "cannot be had: the fields and their defaults are in docs/configuration.md",
    "init-only": "cannot be had: sysctls are written by the agent, see docs/operations.md for the capabilities it needs",
    "healthz-port": "is gone from kube-proxy: use --healthz-bind-address",
    "metrics-port": "is gone from kube-proxy: use --metrics-bind-address",
}
"""Flags that ask for something else than an agent, or are gone, and what to do instead."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add kube-proxy's flags to the agent's parser."""
    group = parser.add_argument_group("flags of kube-proxy", "count where no --config is given; see docs/configuration.md")
    for flag in FLAGS:
        text = f"as {flag.path} in the file"
        if flag.kind == "switch":
            group.add_argument(
                f"--{flag.name}", dest=flag.dest, nargs="?", const=True, type=_switch, metavar="true|false", help=text
            )
        elif flag.kind == "list":
            group.add_argument(f"--{flag.name}", dest=flag.dest, action="append", metavar="A,B", help=text)
        else:
            kind = int if flag.kind == "number" else str
            group.add_argument(f"--{flag.name}", dest=flag.dest, type=kind, metavar="N" if kind is int else "X", help=text)
    for name in (*UNUSED, *REFUSED):
        group.add_argument(f"--{name}", dest=f"other_{name.replace('-', '_')}", nargs="?", const="", help=argparse.SUPPRESS)
    logging = parser.add_argument_group("logs", "beat the file")
    logging.add_argument("--log-format", "--logging-format", choices=["text", "json"], help="lines, or one JSON object a line")
    logging.add_argument("-v", "--v", dest="verbosity", type=int, metavar="N", help="4 and more log everything")


def _switch(text: str) -> bool:
    words = {"true": True, "1": True, "t": True, "false": False, "0": False, "f": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"must be true or false, is {text!r}")
    return words[text.lower()]


def read_config(args: argparse.Namespace) -> NodeConfig:
    """Return what the agent's command line says, the file it names included. Raises ConfigError, and Usage for flags that are refused."""
    for name, instead in REFUSED.items():
        if getattr(args, f"other_{name.replace('-', '_')}", None) is not None:
            raise Usage(f"--{name} {instead}")
    stated = {flag: value for flag in FLAGS if (value := getattr(args, flag.dest, None)) is not None}
    notes = [
        f"--{name} changes nothing here: {why}"
        for name, why in UNUSED.items()
        if getattr(args, f"other_{name.replace('-', '_')}", None) is not None
    ]
    if args.config is not None:
        config = load_config(args.config, args.node or "")
        notes += [f"--{flag.name} is ignored: --config {args.config} is given, and says it all" for flag in stated]
    else:
        config = _from_flags(stated, args.node or "")
    logs = LogOptions(
        getattr(args, "log_format", None) or config.logs.format,
        config.logs.verbosity if getattr(args, "verbosity", None) is None else args.verbosity,
    )
    return msgspec.structs.replace(config, logs=logs, notes=(*notes, *config.notes))


def _from_flags(stated: Mapping[Flag, Any], node: str) -> NodeConfig:
    raw: dict[str, Any] = {"kind": "KubeProxyConfiguration"}
    for flag, value in stated.items():
        found = [part.strip() for text in value for part in text.split(",") if part.strip()] if flag.kind == "list" else value
        section, _, field = flag.path.rpartition(".")
        place = raw.setdefault(section, {}) if section else raw
        place[field] = found
        if section == "iptables" and field in SHARED:
            raw.setdefault("nftables", {})[field] = found
    try:
        return parse_config(raw, node)
    except ConfigError as error:
        raise ConfigError(_as_flag(str(error))) from error


def _as_flag(words: str) -> str:
    """Name the flag instead of the field that it states."""
    path = words.partition(":")[0].partition("[")[0]
    shared = path.replace("nftables.", "iptables.", 1)
    for flag in FLAGS:
        if flag.path in {path, shared}:
            return f"--{flag.name}{words[len(path) :]}"
    return words
