"""``nodeplane render``: what would be programmed, in the native tool's own syntax. Same input, same bytes."""

from __future__ import annotations

import argparse
import sys

from kernelstate.objects.address import Family
from kernelstate.objects.netfilter import Ruleset
from kernelstate.objects.nftables import TableKey
from kernelstate.text.ip_batch import print_links, print_service_link
from kernelstate.text.ipset_save import print_sets
from kernelstate.text.iptables_save import print_ruleset
from kernelstate.text.ipvsadm import print_servers
from kernelstate.text.nft import print_table
from kernelstate.text.socket_tables import print_sockets
from kernelstate.text.udp_tunnel import print_tunnel
from netpolicy.render.nftables import TABLE as POLICY_TABLE
from nodeplane.commands import Usage
from nodeplane.objects_input import NodeView, read_view
from overlay.render.masquerade_nftables import NAMES
from proxy.render.ipvs_program import LINK
from proxy.render.nftables import TABLE

NFT_HEADER = "# nft -f -"
_TOOLS: dict[int, str] = {4: "iptables-restore --noflush", 6: "ip6tables-restore --noflush"}


def run(args: argparse.Namespace) -> int:
    """Print one part of a node's desired state."""
    view = read_view(args)
    for problem in view.desired.problems:
        print(f"nodeplane: {problem}", file=sys.stderr)
    families = _families(view, args.family)
    if args.part == "overlay":
        sys.stdout.write(render_overlay_text(view))
    elif args.part == "policy":
        sys.stdout.write(render_policy_text(view, families))
    else:
        sys.stdout.write(render_services_text(view, families))
    return 0


def render_services_text(view: NodeView, families: tuple[Family, ...]) -> str:
    """Return what Services become, as input for the mode's own tools; several texts are each headed by their tool."""
    match view.config.mode:
        case "nftables":
            tables = view.desired.services.tables
            return "".join(print_table(TableKey(f, TABLE), tables[f]) for f in families if f in tables)
        case "ebpf":
            tables = view.desired.services.tables
            rules = "".join(print_table(TableKey(f, TABLE), tables[f]) for f in families if f in tables)
            return _sections([("sockets", print_sockets(view.desired.services.sockets, families)), ("nft -f -", rules)])
        case "ipvs":
            return _sections([*_ipvs_texts(view, families), *_rules_texts(view, families)])
        case _:
            texts = _rules_texts(view, families)
            return texts[0][1] if len(texts) == 1 else _sections(texts)


def _rules_texts(view: NodeView, families: tuple[Family, ...]) -> list[tuple[str, str]]:
    return [(_TOOLS[f], print_ruleset(view.desired.ruleset_but_policies, f)) for f in families]


def _ipvs_texts(view: NodeView, families: tuple[Family, ...]) -> list[tuple[str, str]]:
    services = view.desired.services
    sets = {name: one for name, one in services.sets.items() if one.spec.family in families}
    servers = {key: one for key, one in services.servers.items() if key.family in families}
    held = sorted(p for p in services.addresses if p.family in families)
    return [
        ("ipset restore", print_sets(sets)),
        ("ipvsadm -R", print_servers(servers)),
        ("ip -batch -", print_service_link(LINK, held)),
    ]


def _sections(texts: list[tuple[str, str]]) -> str:
    return "".join(f"# {tool}\n{text}" for tool, text in texts)


def render_overlay_text(view: NodeView) -> str:
    """Return the overlay's links, routes, neighbours and FDB entries as input for ip and bridge, then what else it needs.

    That is the forwarder's table for a UDP tunnel, and rules where they are the overlay's own.
    """
    if view.config.overlay is None:
        raise Usage("--part overlay: the configuration has no overlay; give one with --config")
    if view.desired.links is None:
        if view.config.overlay.etcd is not None:
            raise Usage("--part overlay: the nodes' leases are in etcd, which only the agent asks; no object states them")
        raise Usage(f"--part overlay: Node {view.config.node_name} has no address among the objects")
    tables, names = view.desired.overlay_tables, NAMES
    rules = "".join(print_table(TableKey(f, names[f]), tables[f]) for f in sorted(tables))
    udp = view.desired.tunnel.udp if view.desired.tunnel else None
    text = print_links(view.desired.links) + (print_tunnel(udp) if udp else "")
    return text + (f"{NFT_HEADER}\n{rules}" if rules else "")


def render_policy_text(view: NodeView, families: tuple[Family, ...]) -> str:
    """Return what NetworkPolicies become, as input for nft, or for ipset and iptables-restore."""
    if view.desired.policies is None:
        raise Usage("--part policy: policy.enabled is false in the configuration; give one with --config")
    state = view.desired.policy_state
    if view.config.policy == "iptables":
        sets = {name: one for name, one in state.sets.items() if one.spec.family in families}
        rules = [(_TOOLS[f], print_ruleset(Ruleset(state.chains, state.anchors), f)) for f in families]
        return _sections([("ipset restore", print_sets(sets)), *rules])
    tables = state.tables
    return "".join(print_table(TableKey(f, POLICY_TABLE), tables[f]) for f in families if f in tables)


def _families(view: NodeView, stated: str | None) -> tuple[Family, ...]:
    if stated is None:
        return view.desired.families
    return (4,) if stated == "4" else (6,)
