"""What the tunnel's programs are given: arguments, which make them what they are, and tables, which change while they run.

    UdpTunnel, SourceGuard --arguments_of--> link, uplink, port, ...         another one: the part is set up anew
                           --tables_of-----> places, nodes                   another one: ``diff_tables``, entry by entry

Pure. How an entry looks in the kernel is for ``linux/tunnel_maps.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import msgspec

from kernelstate.objects.address import IPAddress, Prefix
from kernelstate.objects.tunnel import Place, SourceGuard, UdpTunnel, Whose

Kind: TypeAlias = Literal["udp", "guard"]
Part: TypeAlias = UdpTunnel | SourceGuard
KINDS: tuple[Kind, ...] = ("udp", "guard")


class Tables(msgspec.Struct, frozen=True):
    """Who is where: whose each prefix is, and the outer addresses that packets may come from."""

    places: Mapping[Prefix, Place]
    nodes: frozenset[IPAddress]


class TableChange(msgspec.Struct, frozen=True):
    """An entry to be written or, with ``gone``, deleted: a place, or a node's outer address."""

    gone: bool
    entry: Place | IPAddress

    def __str__(self) -> str:
        return f"{'forget' if self.gone else 'write'} {self.entry}"


def arguments_of(part: Part) -> Part:
    """Return the part without what is in its tables."""
    if isinstance(part, UdpTunnel):
        return msgspec.structs.replace(part, peers=())
    return msgspec.structs.replace(part, peers=(), own=(), network=())


def tables_of(part: Part) -> Tables:
    """Return the tables; where prefixes are equal, the node's own pods count before a peer's, a peer's before nobody's."""
    places: dict[Prefix, Place] = {}
    if isinstance(part, SourceGuard):
        places = {prefix: Place(prefix, Whose.NETWORK) for prefix in part.network}
    places |= {peer.prefix: Place(peer.prefix, Whose.PEER, peer.address) for peer in part.peers}
    if isinstance(part, SourceGuard):
        places |= {prefix: Place(prefix, Whose.OWN) for prefix in part.own}
    return Tables(places, frozenset(peer.address for peer in part.peers))


def diff_tables(wanted: Tables, found: Tables) -> list[TableChange]:
    """Return what turns one into the other, so that no place ever names a node that is not there."""
    changes = [TableChange(gone=False, entry=node) for node in sorted(wanted.nodes - found.nodes, key=_by_family)]
    changes += [TableChange(gone=False, entry=p) for prefix, p in wanted.places.items() if found.places.get(prefix) != p]
    changes += [TableChange(gone=True, entry=p) for prefix, p in found.places.items() if prefix not in wanted.places]
    return changes + [TableChange(gone=True, entry=node) for node in sorted(found.nodes - wanted.nodes, key=_by_family)]


def _by_family(address: IPAddress) -> tuple[int, int]:
    return address.version, int(address)
