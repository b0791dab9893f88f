"""Observes and changes links and what lies on them, in the network namespace in which ``LinuxLinks`` is made.

Implements ``reconcile_links.LinkPort``. Decides nothing: what is to be done comes in as changes, what there is goes out as
records. Objects without our mark are not reported, so nobody can ask for their removal. Which words go over the wire is for
``link_codec.py``.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from kernelstate.diff_links import LinkChange
from kernelstate.linux import ethtool
from kernelstate.linux import link_codec as codec
from kernelstate.linux.link_events import ALL_GROUPS, EventSocket
from kernelstate.linux.rtnetlink import Answer, Message, Request, RouteSocket, number
from kernelstate.linux.tun import make_tun
from kernelstate.linux.uplink import uplink_facts
from kernelstate.objects.links import (
    ALIAS,
    MAIN_TABLE,
    ROUTE_PROTOCOL,
    Address,
    FdbEntry,
    Link,
    LinkObject,
    LinkState,
    Neigh,
    Route,
    Tun,
)
from kernelstate.reconcile_links import LinkEvent

__all__ = ["LinuxLinks", "uplink_facts"]

_GONE = frozenset({errno.ESRCH, errno.ENOENT, errno.ENODEV, errno.EADDRNOTAVAIL})
"""How the kernel says that what is to be deleted does not exist: routes, neighbours and entries, links, addresses."""
_DELETIONS = frozenset({codec.RTM_DELLINK, codec.RTM_DELADDR, codec.RTM_DELROUTE, codec.RTM_DELNEIGH})


class LinuxLinks:
    """The links of the network namespace it is made in; to be used by threads in that namespace only."""

    def __init__(self) -> None:
        self._socket = RouteSocket()
        self._events = EventSocket(ALL_GROUPS)
        self._own: dict[int, str] = {}
        """Index and name of links of ours, and of those that are to be."""
        self._used: dict[int, str] = {}
        self._names: frozenset[str] = frozenset()
        """Names told of in events, whatever their index."""

    def close(self) -> None:
        """Close its sockets; the kernel keeps everything."""
        self._socket.close()
        self._events.close()

    def fileno(self) -> int:
        """Return a descriptor that is readable when ``events`` may have something."""
        return self._events.fileno()

    # -- observe -----------------------------------------------------------------------------------------------------

    def observe(self, own: Collection[str], used: Collection[str]) -> LinkState:
        """Return links with our mark or named in ``own``, what lies on them, and routes of our protocol."""
        request = codec.IFINFO.pack(0, 0, 0, 0, 0) + number(codec.IFLA_EXT_MASK, codec.RTEXT_FILTER_SKIP_STATS)
        messages = self._socket.dump(codec.RTM_GETLINK, request, "links")
        names = {codec.link_index(m): codec.link_name(m) for m in messages}
        name_of = _namer(names)
        found: list[LinkObject] = []
        self._own, self._used = {}, {i: n for i, n in names.items() if n in used}
        for message in messages:
            link = codec.read_link(message, name_of)
            if link.alias != ALIAS and link.name not in own:
                continue
            self._own[codec.link_index(message)] = link.name
            found.append(_with_accept_ra(link))
        for i in self._own:
            found += self._on_link(i, name_of)
        for family in codec.AF.values():
            header = codec.RTMSG.pack(family, 0, 0, 0, MAIN_TABLE, ROUTE_PROTOCOL, 0, 0, 0)
            routes = self._socket.dump(codec.RTM_GETROUTE, header, "routes")
            found += [r for m in routes if (r := codec.read_route(m, name_of)) and r.protocol == ROUTE_PROTOCOL]
        self._names = frozenset({*own, *used, *self._own.values()})
        return LinkState.of(found)

    def _on_link(self, i: int, name_of: codec.NameOf) -> list[LinkObject]:
        found: list[LinkObject] = []
        for family in codec.AF.values():
            header = codec.IFADDR.pack(family, 0, 0, 0, i)
            addresses = self._socket.dump(codec.RTM_GETADDR, header, "addresses")
            found += [a for m in addresses if (a := codec.read_address(m, name_of)) and a.link == name_of(i)]
        neighbours = self._socket.dump(
            codec.RTM_GETNEIGH, codec.NDMSG.pack(0, 0, 0, 0, 0) + number(codec.NDA_IFINDEX, i), "neighbours"
        )
        entries = self._socket.dump(codec.RTM_GETNEIGH, codec.NDMSG.pack(codec.AF_BRIDGE, i, 0, 0, 0), "forwarding entries")
        for message in (*neighbours, *entries):
            one = codec.read_neigh(message, name_of)
            if codec.neigh_index(message) == i and one is not None and not (isinstance(one, Neigh) and not one.mac):
                found.append(one)
        return found

    # -- apply -------------------------------------------------------------------------------------------------------

    def apply(self, changes: Sequence[LinkChange]) -> list[str]:
        """Do each, going on after failures; links one by one, since what follows needs their index, the rest in batches."""
        answers = [""] * len(changes)
        waiting: list[tuple[int, Request]] = []
        for i, change in enumerate(changes):
            if isinstance(change.obj, Link):
                self._flush(waiting, answers)
                answers[i] = self._link(change.verb, change.obj, change.before)
                continue
            index = _index(change.obj.link)
            if index:
                waiting.append((i, _request(change, index)))
            elif change.verb != "delete":
                answers[i] = f"no link {change.obj.link}"
        self._flush(waiting, answers)
        return answers

    def _flush(self, waiting: list[tuple[int, Request]], answers: list[str]) -> None:
        for (i, request), answer in zip(waiting, self._socket.execute([r for _, r in waiting]), strict=True):
            answers[i] = _judged(request, answer)
        waiting.clear()

    def _link(self, verb: str, link: Link, before: Link | None) -> str:
        if verb == "delete":
            index = _index(link.name)
            return self._one(codec.delete_link(index)) if index else ""
        if verb == "create":
            underlay = link.underlay
            below = _index(underlay) if underlay else 0
            if underlay and not below:
                return f"no link {underlay} to carry it"
            words = make_tun(link.name) if isinstance(link.kind, Tun) else self._one(codec.new_link(link, below))
            if words:
                return words
        index = _index(link.name)
        self._own[index] = link.name
        # Before it is up: an advertisement may come in at once.
        refused = _write_accept_ra(link)
        if before is None:
            # A vxlan link is made with its MTU, a TUN with the kernel's 1500.
            before = msgspec.structs.replace(
                link, alias="", up=False, mtu=0 if isinstance(link.kind, Tun) else link.mtu, tx_checksum=None
            )
        return refused or self._one(codec.set_link(link, before, index)) or _write_checksum(link, before)

    def _one(self, request: Request) -> str:
        return _judged(request, self._socket.execute([request])[0])

    def tx_checksum(self, link: str) -> bool | None:
        """Return whether checksums are left to a link; None if there is none."""
        try:
            return ethtool.tx_checksum(link)
        except OSError:
            return None

    # -- events ------------------------------------------------------------------------------------------------------

    def events(self) -> list[LinkEvent] | None:
        """Return what happened to links of ours and what lies on them, to links we use, and to any route of the main table."""
        messages = self._events.read()
        if messages is None:
            return None
        found = []
        for message in messages:
            obj = self._read_event(message)
            if obj is not None:
                gone = message.type in _DELETIONS
                found.append(LinkEvent(gone, obj))
        return found

    def _read_event(self, message: Message) -> LinkObject | None:
        name_of = _namer(self._own | self._used)
        match message.type:
            case codec.RTM_NEWLINK | codec.RTM_DELLINK:
                return self._read_link_event(message)
            case codec.RTM_NEWNEIGH | codec.RTM_DELNEIGH:
                return codec.read_neigh(message, name_of) if codec.neigh_index(message) in self._own else None
            case codec.RTM_NEWROUTE | codec.RTM_DELROUTE:
                return codec.read_route(message, name_of)
            case codec.RTM_NEWADDR | codec.RTM_DELADDR:
                address = codec.read_address(message, name_of)
                return address if address is not None and address.link in self._own.values() else None
            case _:
                return None

    def _read_link_event(self, message: Message) -> Link | None:
        index, name = codec.link_index(message), codec.link_name(message)
        if codec.IFINFO.unpack_from(message.body)[0] == codec.AF_BRIDGE:
            return None  # tells of a bridge port's state, without most of the link's own attributes
        known = self._own.get(index) or self._used.get(index)
        if known is not None and known != name:
            return Link(known, 0, "", None, up=False)  # renamed: as we know it, it is gone
        if name not in self._names:
            return None
        return codec.read_link(message, _socket_name)


def _request(change: LinkChange, index: int) -> Request:
    delete = change.verb == "delete"
    match change.obj:
        case Address() as address:
            return codec.address_request(address, index, delete=delete)
        case Neigh() as neigh:
            return codec.neigh_request(neigh, index, delete=delete)
        case FdbEntry() as entry:
            return codec.fdb_request(entry, index, delete=delete)
        case Route() as route:
            return codec.route_request(route, index, delete=delete)
        case Link():
            raise AssertionError("links are changed one by one")


def _judged(request: Request, answer: Answer) -> str:
    return "" if request.type in _DELETIONS and answer.code in _GONE else answer.words


def _namer(names: dict[int, str]) -> codec.NameOf:
    return lambda index: names.get(index) or f"if{index}"


def _index(name: str) -> int:
    """Return a link's index in the thread's namespace, 0 if there is none."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _socket_name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"if{index}"


def _accept_ra_file(name: str) -> Path:
    """Return the file; ``/proc/sys/net`` shows the namespace of the thread that opens it."""
    return Path("/proc/sys/net/ipv6/conf") / name / "accept_ra"


def _with_accept_ra(link: Link) -> Link:
    try:
        value = _accept_ra_file(link.name).read_text().strip()
    except OSError:
        value = "0"  # no IPv6: nothing to believe
    return msgspec.structs.replace(link, accept_ra=value != "0")


def _write_accept_ra(link: Link) -> str:
    file = _accept_ra_file(link.name)
    try:
        if file.exists():
            file.write_text("1" if link.accept_ra else "0")
    except OSError as error:
        return f"accept_ra: {error.strerror}"
    return ""


def _write_checksum(link: Link, before: Link) -> str:
    if link.tx_checksum is None or link.tx_checksum == before.tx_checksum:
        return ""
    try:
        ethtool.switch(link.name, ethtool.SET_TX_CHECKSUM, on=link.tx_checksum)
    except OSError as error:
        return f"tx-checksum: {error.strerror}"
    return ""
