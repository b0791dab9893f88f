"""``nodeplane render``: what would be programmed, in the native tool's own syntax. Same input, same bytes."""

from __future__ import annotations

import argparse
import sys

from kernelstate.objects.address import Family
from kernelstate.text.ip_batch import print_links
from kernelstate.text.iptables_save import print_ruleset
from nodeplane.commands import Usage
from nodeplane.objects_input import NodeView, read_view

_TOOLS: dict[int, str] = {4: "iptables-restore --noflush", 6: "ip6tables-restore --noflush"}


def run(args: argparse.Namespace) -> int:
    """Print one part of a node's desired state."""
    view = read_view(args)
    for problem in view.desired.problems:
        print(f"nodeplane: {problem}", file=sys.stderr)
    families = _families(view, args.family)
    if args.part == "overlay":
        sys.stdout.write(render_overlay_text(view))
    else:
        sys.stdout.write(render_services_text(view, families))
    return 0


def render_services_text(view: NodeView, families: tuple[Family, ...]) -> str:
    """Return the packet filter's rules as restore input; with two families, two texts, each headed by its tool."""
    texts = [print_ruleset(view.desired.ruleset, family) for family in families]
    if len(texts) == 1:
        return texts[0]
    return "".join(f"# {_TOOLS[f]}\n{text}" for f, text in zip(families, texts, strict=True))


def render_overlay_text(view: NodeView) -> str:
    """Return the overlay's links, routes, neighbours and FDB entries as input for ip and bridge."""
    if view.config.overlay is None:
        raise Usage("--part overlay: the configuration has no overlay; give one with --config")
    if view.desired.links is None:
        raise Usage(f"--part overlay: Node {view.config.node_name} has no address among the objects")
    return print_links(view.desired.links)


def _families(view: NodeView, stated: str | None) -> tuple[Family, ...]:
    if stated is None:
        return view.desired.families
    return (4,) if stated == "4" else (6,)
