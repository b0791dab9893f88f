"""The table of commands: their options, and the function behind each, imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Subparsers = Any
"""argparse keeps the type of its sub-parser collection to itself."""


class Usage(Exception):  # noqa: N818 (it is about the caller, not about us)
    """Bad usage or bad input: exit 2."""


class Failed(Exception):  # noqa: N818
    """The answer is no, or the work failed: exit 1."""


def lazy(module: str, function: str = "run") -> Callable[[argparse.Namespace], int]:
    """Return a command that imports its module when it is called: `--help` and small commands stay fast."""

    def call(args: argparse.Namespace) -> int:
        result: int = getattr(importlib.import_module(module), function)(args)
        return result

    return call


def add_commands(subparsers: Subparsers) -> None:
    """Add every command."""
    _add_render(subparsers)
    _add_explain(subparsers)
    _add_policy(subparsers)
    _add_agent(subparsers)
    _add_status(subparsers)
    _add_drops(subparsers)
    from nodeplane.lab_commands import add_lab_parser  # noqa: PLC0415 (only names and options, but many)

    add_lab_parser(subparsers)
    _add_bench(subparsers)


def _objects(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--objects",
        action="append",
        type=Path,
        metavar="PATH",
        default=None,
        help="Kubernetes objects: a YAML or JSON file, or a directory of them; may be given several times",
    )
    parser.add_argument("--kubeconfig", type=Path, metavar="F", help="the API server that objects come from instead")


def _node(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--node", metavar="N", required=required, help="the Node whose view it is")
    parser.add_argument("--config", type=Path, metavar="F", help="NodeConfiguration or KubeProxyConfiguration")
    parser.add_argument(
        "--mode", metavar="M", help="how Services are rendered: iptables, ipvs, nftables or ebpf; beats the configuration"
    )


def _add_render(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("render", help="print what would be programmed, in the native tool's syntax; no root")
    _objects(parser)
    _node(parser, required=True)
    parser.add_argument("--part", choices=["services", "policy", "overlay"], help="only this part (default: services)")
    parser.add_argument("--family", choices=["4", "6"], help="only this address family")
    _local_addresses(parser)
    parser.set_defaults(run=lazy("nodeplane.render"))


def _local_addresses(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--local-address",
        action="append",
        metavar="IP",
        default=[],
        help="an address of the node besides those of its Node object; may be given several times",
    )


def _add_explain(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("explain", help="what happens to the first packet of a connection, and why; no root")
    _objects(parser)
    _node(parser, required=True)
    _local_addresses(parser)
    parser.add_argument("--from", dest="source", metavar="SRC", help="namespace/pod, an IP, or node")
    parser.add_argument("--to", dest="destination", metavar="IP:PORT[/PROTO]", help="where to; TCP unless said")
    parser.add_argument("--flows", type=Path, metavar="FILE", help="many flows: a JSON list")
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")
    parser.set_defaults(run=lazy("nodeplane.explain"))


def _add_policy(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("policy", help="what policies do: `policy impact`")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    parser = verbs.add_parser("impact", help="which connections a change would open or close; exit 1 if any; no root")
    parser.add_argument(
        "-f",
        "--file",
        action="append",
        type=Path,
        metavar="FILE",
        required=True,
        help="objects that change; - is standard input",
    )
    parser.add_argument("--delete", action="store_true", help="they would be deleted instead")
    _objects(parser)
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")
    parser.set_defaults(run=lazy("nodeplane.policy_command"))


def _add_agent(subparsers: Subparsers) -> None:
    from nodeplane.flags import add_flags  # noqa: PLC0415 (only names and options, but many)

    parser = subparsers.add_parser("agent", help="the daemon: keep this node's kernel as the objects say", allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="F", help="NodeConfiguration or KubeProxyConfiguration")
    parser.add_argument(
        "--node", "--hostname-override", metavar="N", help="the Node's name (default: nodeName in the file, else the host name)"
    )
    _objects(parser)
    parser.add_argument("--master", metavar="URL", help="the API server's address, instead of what the kubeconfig says")
    add_flags(parser)
    parser.set_defaults(run=lazy("nodeplane.daemon"))


def _add_status(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("status", help="what is programmed on this node and how far it is from desired")
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")
    parser.set_defaults(run=lazy("nodeplane.status_command"))
    parser = subparsers.add_parser("cleanup", help="remove every trace of nodeplane from this node's kernel")
    parser.set_defaults(run=lazy("nodeplane.cleanup"))


def _add_drops(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("drops", help="who dropped packets on this machine, and why, as it happens")
    parser.add_argument("--for", dest="seconds", type=float, metavar="SECONDS", help="how long (default: until stopped)")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="how often to print (default: 1)")
    parser.add_argument("--netns", metavar="NAME", help="only in this network namespace, as `ip netns` names it, or host")
    parser.add_argument("--reason", metavar="R", help="only for this reason, as the kernel names it: NETFILTER_DROP")
    parser.add_argument("--all", action="store_true", help="also what is always dropped: ends of sockets, neighbours' groups")
    parser.add_argument(
        "--latency", action="store_true", help="end with histograms: over a link, and of connecting to each address"
    )
    _objects(parser)
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text", help="json: an object a line")
    parser.set_defaults(run=lazy("nodeplane.drops"))


def _add_bench(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("bench", help="measure; without a name, everything")
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("--services", type=int, metavar="N", help="how many Services (default: the benchmark's own)")
    parser.add_argument("--mode", metavar="M", help="service mode: iptables, ipvs or nftables")
    parser.add_argument("--results", type=Path, metavar="DIR", default=Path("bench/results"), help="where JSON and plots go")
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")
    parser.set_defaults(run=lazy("bench.run"))
