"""The link that carries service addresses, over rtnetlink: making it, observing it, hearing of changes.

    kind      what it is for               why it would do
    dummy     nothing: it drops all        kube-proxy's choice
    ifb       redirecting for tc           where there is no dummy: also drops all, no ARP
    bridge    joining links                without ports it has no carrier; ARP is switched off

The first kind that the kernel takes is used. The link stays down: addresses count as the node's own on a link that is down as well,
and one that was never up cannot be taken down, which would cost its IPv6 addresses.

Implements ``reconcile_addresses.ServiceAddressPort``. Source: net/ipv4/fib_frontend.c (fib_add_ifaddr), net/ipv6/addrconf.c
(addrconf_ifdown).
"""

from __future__ import annotations

import errno
import secrets
import socket
import struct
from collections.abc import Sequence

from kernelstate.errors import KernelRefusedError, MissingFeatureError
from kernelstate.features import Feature
from kernelstate.linux import link_codec as codec
from kernelstate.linux.link_events import GROUP_IPV4_IFADDR, GROUP_IPV6_IFADDR, GROUP_LINK, EventSocket
from kernelstate.linux.rtnetlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Answer,
    Message,
    Request,
    RouteSocket,
    attribute,
    attributes,
    number,
)
from kernelstate.objects.address import BITS, Prefix
from kernelstate.reconcile_addresses import SERVICE_ALIAS, SERVICE_LINK, AddressEvent, ServiceLink

KINDS = ("dummy", "ifb", "bridge")
GROUPS = (GROUP_LINK, GROUP_IPV4_IFADDR, GROUP_IPV6_IFADDR)
IFF_NOARP = 0x80
IFA_F_NODAD, IFA_F_NOPREFIXROUTE = 0x2, 0x200
_GONE = frozenset({errno.EADDRNOTAVAIL, errno.ENODEV})
_ADDRESS = {4: struct.Struct("=BBBBiHH4sHH4sHHI"), 6: struct.Struct("=BBBBiHH16sHH16sHHI")}
"""struct ifaddrmsg, then IFA_LOCAL, IFA_ADDRESS, IFA_FLAGS."""


class LinuxServiceAddresses:
    """The link of the network namespace it is made in; to be used by threads in that namespace only.

    ``kinds`` are tried in order when it has to be made.
    """

    def __init__(self, name: str = SERVICE_LINK, kinds: Sequence[str] = KINDS) -> None:
        self.name, self._kinds = name, kinds
        self._socket = RouteSocket()
        self._events = EventSocket(GROUPS)
        self._index = 0

    def close(self) -> None:
        """Close its sockets; the kernel keeps everything."""
        self._socket.close()
        self._events.close()

    def fileno(self) -> int:
        """Return a descriptor that is readable when ``events`` may have something."""
        return self._events.fileno()

    # -- observe -----------------------------------------------------------------------------------------------------

    def observe(self) -> ServiceLink | None:
        """Return the link, None if there is none."""
        found = self._find()
        if found is None:
            self._index = 0
            return None
        self._index = codec.link_index(found)
        link = codec.read_link(found, str)
        hosts: list[Prefix] = []
        strange: list[str] = []
        for message in self._addresses():
            address, length = _read_address(message)
            if address.length == length:
                hosts.append(address)
            elif not _is_link_local(message):
                strange.append(f"{address.address_text}/{length}")
        return ServiceLink(frozenset(hosts), link.alias == SERVICE_ALIAS, tuple(strange))

    def events(self) -> list[AddressEvent] | None:
        """Return what happened to the link since the last call; None if some of it was lost."""
        messages = self._events.read()
        if messages is None:
            return None
        found = []
        for message in messages:
            event = self._read_event(message)
            if event is not None:
                found.append(event)
        return found

    def _read_event(self, message: Message) -> AddressEvent | None:
        match message.type:
            case codec.RTM_NEWADDR | codec.RTM_DELADDR:
                if codec.IFADDR.unpack_from(message.body)[4] != self._index or _is_link_local(message):
                    return None
                address, length = _read_address(message)
                gone = message.type == codec.RTM_DELADDR
                return AddressEvent(gone, address if address.length == length else None)
            case codec.RTM_NEWLINK | codec.RTM_DELLINK:
                return self._read_link_event(message)
            case _:
                return None

    def _read_link_event(self, message: Message) -> AddressEvent | None:
        """Tell of a link that came, went or was renamed. A link that is down tells of no other change."""
        gone, named = message.type == codec.RTM_DELLINK, codec.link_name(message) == self.name
        if not named and codec.link_index(message) != self._index:
            return None
        changed = gone or not named or codec.link_index(message) != self._index
        return AddressEvent(gone, None) if changed else None

    def _find(self) -> Message | None:
        request = codec.IFINFO.pack(0, 0, 0, 0, 0) + number(codec.IFLA_EXT_MASK, codec.RTEXT_FILTER_SKIP_STATS)
        links = self._socket.dump(codec.RTM_GETLINK, request, "links")
        return next((link for link in links if codec.link_name(link) == self.name), None)

    def _addresses(self) -> list[Message]:
        found: list[Message] = []
        for family in codec.AF.values():
            header = codec.IFADDR.pack(family, 0, 0, 0, self._index)
            found += self._socket.dump(codec.RTM_GETADDR, header, f"addresses of {self.name}")
        return found

    # -- apply -------------------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the link, or mark the one that is there. Raises MissingFeatureError if no kind would do."""
        words = []
        for kind in self._kinds:
            answer = self._make(self.name, kind)
            if answer.code in {0, errno.EEXIST}:
                break
            words.append(f"{kind}: {answer.words}")
        else:
            raise MissingFeatureError(Feature.DUMMY_LINK, "; ".join(words))
        self._index = socket.if_nametoindex(self.name)
        mark = attribute(codec.IFLA_IFALIAS, SERVICE_ALIAS.encode() + b"\0")
        body = codec.IFINFO.pack(0, 0, self._index, IFF_NOARP, IFF_NOARP) + mark
        self._one("mark", Request(codec.RTM_NEWLINK, 0, body))
        self.events()  # it came: we know

    def delete(self) -> None:
        """Delete the link and all its addresses."""
        if self._index:
            self._one("delete", codec.delete_link(self._index))
        self._index = 0
        self.events()  # ten thousand addresses went: we know

    def apply(self, added: Sequence[Prefix], deleted: Sequence[Prefix]) -> list[str]:
        """Add, then delete addresses, going on after failures; return a line for each that was refused."""
        requests = [_request(address, self._index, delete=False) for address in added]
        requests += [_request(address, self._index, delete=True) for address in deleted]
        refused = []
        for request, answer, address in zip(requests, self._socket.execute(requests), (*added, *deleted), strict=True):
            if answer.code and not (request.type == codec.RTM_DELADDR and answer.code in _GONE):
                verb = "delete" if request.type == codec.RTM_DELADDR else "add"
                refused.append(f"{verb} address {address} dev {self.name}: {answer.words}")
        return refused

    def drop_strange(self) -> None:
        """Delete addresses with a subnet."""
        for message in self._addresses():
            address, length = _read_address(message)
            if address.length != length and not _is_link_local(message):
                request = _request(Prefix(address.family, address.network, length), self._index, delete=True)
                self._one("delete address of", request)

    def _make(self, name: str, kind: str) -> Answer:
        info = attribute(codec.IFLA_INFO_KIND, kind.encode() + b"\0")
        body = codec.IFINFO.pack(0, 0, 0, 0, 0) + attribute(codec.IFLA_IFNAME, name.encode() + b"\0")
        body += attribute(codec.IFLA_LINKINFO, info)
        return self._socket.execute([Request(codec.RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)])[0]

    def has_kind(self, kind: str) -> bool:
        """Whether this kernel makes links of a kind: makes one, and deletes it."""
        name = f"np-p-{secrets.token_hex(3)}"
        if self._make(name, kind).code:
            return False
        by_name = codec.IFINFO.pack(0, 0, 0, 0, 0) + attribute(codec.IFLA_IFNAME, name.encode() + b"\0")
        self._one("delete", Request(codec.RTM_DELLINK, 0, by_name))
        return True

    def _one(self, operation: str, request: Request) -> None:
        answer = self._socket.execute([request])[0]
        if answer.code and not (request.type in {codec.RTM_DELLINK, codec.RTM_DELADDR} and answer.code in _GONE):
            raise KernelRefusedError(operation, f"link {self.name}", answer.words)


def _request(address: Prefix, index: int, *, delete: bool) -> Request:
    """Add or delete an address: without duplicate detection and without a route to its subnet, for it has none."""
    family, size = address.family, BITS[address.family] // 8
    packed = address.network.to_bytes(size, "big")
    body = _ADDRESS[family].pack(
        codec.AF[family], address.length, 0, codec.RT_SCOPE_UNIVERSE, index,
        4 + size, codec.IFA_LOCAL, packed, 4 + size, codec.IFA_ADDRESS, packed,
        8, codec.IFA_FLAGS, IFA_F_NODAD | IFA_F_NOPREFIXROUTE,
    )  # fmt: skip
    return Request(codec.RTM_DELADDR, 0, body) if delete else Request(codec.RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body)


def _read_address(message: Message) -> tuple[Prefix, int]:
    """Return an address as a host prefix, and the length it has on the link."""
    family, length, *_ = codec.IFADDR.unpack_from(message.body)
    found = attributes(message.body, codec.IFADDR.size)
    packed = found.get(codec.IFA_LOCAL) or found[codec.IFA_ADDRESS]
    version = 4 if family == codec.AF_INET else 6
    return Prefix(version, int.from_bytes(packed, "big"), BITS[version]), length  # type: ignore[arg-type]


def _is_link_local(message: Message) -> bool:
    """Whether it is one that the kernel itself gives to a link that is up."""
    return bool(codec.IFADDR.unpack_from(message.body)[3] == codec.RT_SCOPE_LINK)
