"""``nodeplane policy impact``: which connections a change of policies, or of labels, would open or close before it is applied.

    objects (files, or a server) ------------------> policy table of the whole cluster --.
      '-- with the objects of -f in their place,                                          +--> netpolicy/impact.py --> a line an effect
          or without them (--delete) --------------> another ----------------------------'

Exit 0: nothing differs. 1: something would. 2: bad usage or bad input. No root, and no word to the kernel or the server.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from ipaddress import summarize_address_range
from pathlib import Path
from typing import Any

import msgspec

from clusterstate.objects import IPAddress, KubernetesObject, ObjectRef
from clusterstate.parse import parse_document
from clusterstate.snapshot import Name, Snapshot, edited
from netpolicy.compile import compile_policies, live
from netpolicy.impact import LAST_PORT, PROTOCOLS, Effect, Ends, Outside, impact
from netpolicy.table import PortRange
from nodeplane.cluster_source import read_once
from nodeplane.commands import Usage
from nodeplane.config import default_config

NAMED = 4
"""Pods of a namespace, or address blocks, that are named one by one; of more the rest is counted."""


def run(args: argparse.Namespace) -> int:
    """Print what would differ. Raises Usage, Failed."""
    found = read_once(args, default_config("", ""))
    for fault in found.errors:
        print(f"nodeplane: {'' if fault.kept else 'left out: '}{fault}", file=sys.stderr)
    before = found.snapshot
    stated = [one for path in args.file for one in read_objects(path)]
    after = without(before, stated) if args.delete else edited(before, (), stated)
    effects = effects_of(before, after)
    if args.output == "json":
        sys.stdout.write(msgspec.json.format(msgspec.json.encode([_as_json(one) for one in effects]), indent=2).decode() + "\n")
    else:
        print("\n".join(text_of(effects, after)))
    return 1 if effects else 0


def read_objects(path: Path) -> list[KubernetesObject]:
    """Return the objects of a file, ``-`` being standard input. Raises Usage for the first that cannot be taken as it stands."""
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise Usage(f"-f {path}: {error.strerror}") from error
    parsed = parse_document(data, str(path), is_json=path.suffix == ".json")
    if parsed.errors:
        raise Usage(str(parsed.errors[0]))
    found = [one for made in parsed.made.values() for one in made]
    if not found:
        raise Usage(f"-f {path}: has no object that policies are made of")
    return found


def without(snapshot: Snapshot, stated: Iterable[KubernetesObject]) -> Snapshot:
    """Return a snapshot without the objects of these kinds and names. Raises Usage for one that is not there."""
    held: dict[ObjectRef, KubernetesObject] = {one.ref: one for one in snapshot.objects()}
    gone = []
    for one in stated:
        if one.ref not in held:
            raise Usage(f"--delete: there is no {one.ref}")
        gone.append(held[one.ref])
    return edited(snapshot, gone, ())


def effects_of(before: Snapshot, after: Snapshot) -> list[Effect]:
    """Return what a change opens and closes for the pods that are there before and after, with the addresses they have."""
    pods = {name: pod.ips for name, pod in after.pods.items() if live(pod) and live(before.pods.get(name))}
    return impact(compile_policies(before, None), compile_policies(after, None), pods)


# -- words -------------------------------------------------------------------------------------------------------------


def text_of(effects: list[Effect], snapshot: Snapshot) -> list[str]:
    """Return lines for people, a sum at the end."""
    if not effects:
        return ["nothing opens and nothing closes"]
    in_namespace: dict[str, set[Name]] = defaultdict(set)
    for name, pod in snapshot.pods.items():
        if live(pod):
            in_namespace[name[0]].add(name)
    families = {ip.version for pod in snapshot.pods.values() for ip in pod.ips}
    lines = []
    for one in effects:
        only = "" if len(one.families) == len(families) else f"   IPv{one.families[0]} only"
        who = f"{_who(one.source, in_namespace)} -> {_who(one.destination, in_namespace)}"
        lines.append(f"{one.kind:<7} {who}   {ports_of(one.ports)}{only}")
        lines += [f"        {reason}" for reason in one.because]
    opened = sum(one.kind == "opens" for one in effects)
    return [*lines, "", f"{opened} opened, {len(effects) - opened} closed"]


def ports_of(ports: tuple[PortRange, ...]) -> str:
    """Return ranges of ports in words: ``TCP 80, 8000-8080; UDP every port``."""
    if {(p.protocol, p.first, p.last) for p in ports} == {(protocol, 1, LAST_PORT) for protocol in PROTOCOLS}:
        return "every port"
    by_protocol: dict[str, list[str]] = defaultdict(list)
    for port in sorted(ports, key=lambda p: (PROTOCOLS.index(p.protocol), p.first)):
        by_protocol[port.protocol].append(_range(port, "every port"))
    return "; ".join(f"{protocol} {', '.join(ranges)}" for protocol, ranges in by_protocol.items())


def _range(port: PortRange, everything: str) -> str:
    if (port.first, port.last) == (1, LAST_PORT):
        return everything
    return str(port.first) if port.first == port.last else f"{port.first}-{port.last}"


def _who(ends: Ends, in_namespace: dict[str, set[Name]]) -> str:
    words: list[str] = []
    by_namespace: dict[str, list[Name]] = defaultdict(list)
    for name in sorted(ends.pods):
        by_namespace[name[0]].append(name)
    for namespace, names in by_namespace.items():
        if len(names) > 1 and set(names) == in_namespace[namespace]:
            words.append(f"all {len(names)} pods of namespace {namespace}")
            continue
        words += ["/".join(name) for name in names[:NAMED]]
        if len(names) > NAMED:
            words.append(f"{len(names) - NAMED} more of namespace {namespace}")
    return ", ".join([*words, *_addresses(ends.outside)])


def _addresses(outside: Iterable[Outside]) -> Iterator[str]:
    by_family: dict[int, list[Outside]] = defaultdict(list)
    for one in outside:
        by_family[one.pieces[0][0].version].append(one)
    for version, found in sorted(by_family.items()):
        if _is_everything(found):
            yield f"every IPv{version} address outside"
            continue
        blocks = list(_blocks(one for one in found if not one.rest))
        yield from blocks[:NAMED]
        if len(blocks) > NAMED:
            yield f"{len(blocks) - NAMED} more blocks"
        if any(one.rest for one in found):
            yield f"every other IPv{version} address"


def _is_everything(found: Iterable[Outside]) -> bool:
    """Whether pieces of one family leave nothing out."""
    ranges = list(_joined(found))
    return len(ranges) == 1 and int(ranges[0][0]) == 0 and int(ranges[0][1]) == (1 << ranges[0][1].max_prefixlen) - 1


def _joined(found: Iterable[Outside]) -> list[tuple[IPAddress, IPAddress]]:
    """Join what touches, of one family."""
    ranges: list[tuple[IPAddress, IPAddress]] = []
    for first, last in sorted((piece for one in found for piece in one.pieces), key=lambda piece: int(piece[0])):
        if ranges and int(first) == int(ranges[-1][1]) + 1:
            ranges[-1] = (ranges[-1][0], last)
        else:
            ranges.append((first, last))
    return ranges


def _blocks(found: Iterable[Outside]) -> Iterator[str]:
    for first, last in _joined(found):
        yield from map(str, summarize_address_range(first, last))


def _as_json(effect: Effect) -> dict[str, Any]:
    return {
        "change": "open" if effect.kind == "opens" else "close",
        "families": effect.families,
        "from": _json_ends(effect.source),
        "to": _json_ends(effect.destination),
        "ports": [{"protocol": p.protocol, "ports": _range(p, "*")} for p in effect.ports],
        "because": effect.because,
    }


def _json_ends(ends: Ends) -> list[str]:
    blocks: list[str] = []
    for version in (4, 6):
        blocks += _blocks(one for one in ends.outside if one.pieces[0][0].version == version)
    return [*("/".join(name) for name in sorted(ends.pods)), *blocks]
