"""What to do to links, addresses, neighbours, forwarding entries and routes so that the kernel holds what is desired.

Decides the order, and what an existing link allows: its MTU, MAC, alias and state are set in place, so that a link left by an
earlier run or by flanneld carries packets all the time; anything else means another link, and all that lay on the old one is
gone with it.

    1 links         made, or set right
    2 addresses
    3 neighbours    before the routes that lead to them: a packet that finds its route finds the rest
    4 forwarding
    5 routes
    6 deletions     in the opposite order; what lies on a link that goes need not be deleted by itself

Writing is for ``linux/links.py``; when, and what becomes of failures, for ``reconcile_links.py``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, TypeAlias

import msgspec

from kernelstate.objects.links import WORDS, Address, FdbEntry, Link, LinkObject, LinkState, Neigh, Route

Verb: TypeAlias = Literal["create", "set", "replace", "delete"]


class LinkChange(msgspec.Struct, frozen=True):
    """One thing to do. Links are created, set in place or deleted; everything else is replaced (made if missing) or deleted."""

    verb: Verb
    obj: LinkObject
    before: Link | None = None
    """What a link that is set was before: only what differs is to be written."""

    def __str__(self) -> str:
        return f"{self.verb} {WORDS[type(self.obj)]} {self.obj}"


def key_of(obj: LinkObject) -> Hashable:
    """Return what the kernel tells an object from others of its kind by; two with one key cannot both exist.

    A forwarding entry is its own key: one MAC may have several destinations.
    """
    match obj:
        case Link():
            return ("link", obj.name)
        case Address():
            return ("address", obj.link, obj.address)
        case Neigh():
            return ("neigh", obj.link, obj.address)
        case Route():
            return ("route", obj.destination, obj.table, obj.metric)
        case FdbEntry():
            return obj


def index(state: LinkState) -> dict[Hashable, LinkObject]:
    """Return a state's objects by their keys."""
    return {key_of(obj): obj for obj in state.objects()}


def diff_links(desired: LinkState, observed: LinkState) -> tuple[LinkChange, ...]:
    """Return what turns ``observed`` into ``desired``, in the order in which to do it; nothing if they are the same."""
    if desired == observed:
        return ()
    links = _link_changes(desired, observed)
    lost = {change.obj.name for change in links if change.verb == "delete" and isinstance(change.obj, Link)}
    # A new MAC makes the kernel forget every neighbour of the link, permanent ones as well (neigh_changeaddr).
    moved = {c.obj.name for c in links if isinstance(c.obj, Link) and c.before is not None and c.before.mac != c.obj.mac}
    remaining = [
        o
        for o in observed.objects()
        if not isinstance(o, Link) and o.link not in lost and not (isinstance(o, Neigh) and o.link in moved)
    ]
    have = {key_of(o): o for o in remaining}
    want = {key_of(o): o for o in desired.objects() if not isinstance(o, Link)}
    made = [LinkChange("replace", o) for key, o in want.items() if have.get(key) != o]
    gone = [LinkChange("delete", o) for o in reversed(remaining) if key_of(o) not in want]
    kept = desired.own_links
    first = [c for c in links if c.verb != "delete" or c.obj.name in kept]  # type: ignore[union-attr]  # all are links
    last = [c for c in links if c.verb == "delete" and c.obj.name not in kept]  # type: ignore[union-attr]
    return (*first, *made, *gone, *last)


def _link_changes(desired: LinkState, observed: LinkState) -> Sequence[LinkChange]:
    have = {link.name: link for link in observed.links}
    changes = []
    for link in desired.links:
        found = have.pop(link.name, None)
        if found is None:
            changes.append(LinkChange("create", link))
        elif found.kind != link.kind:
            changes += [LinkChange("delete", found), LinkChange("create", link)]
        elif found != link:
            changes.append(LinkChange("set", link, found))
    return [*changes, *(LinkChange("delete", link) for link in have.values())]
