"""Single fields of Kubernetes objects: what a port, an address, a name or a set of labels may be, and how it is held.

Everything here takes a field's path with its value and either returns the checked value or raises ``Fault``. Which fields an
object has and how they belong together is for the ``parse_*`` modules.

Addresses are read as Kubernetes reads them, sloppily: ``172.30.0.041`` is 172.30.0.41, never octal (Go's old net.ParseIP, which
objects in etcd were written with).

Strings that come again and again (namespaces, node and port names) are interned, so that equal ones are one object.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from socket import AF_INET, AF_INET6, inet_pton
from sys import intern

import msgspec
from immutables import Map

from clusterstate.faults import Fault, shown
from clusterstate.objects import NO_LABELS, IPAddress, IPNetwork, Labels, Protocol

MAX_ANNOTATION_BYTES = 262144
"""Keys and values of one object together (apimachinery, TotalAnnotationSizeLimitB)."""
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
"""kubectl's copy of the whole object: never looked at here, so never kept."""

_PROTOCOLS: dict[str | None, Protocol] = {None: "TCP", "": "TCP", "TCP": "TCP", "UDP": "UDP", "SCTP": "SCTP"}
_is_label = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?").fullmatch
_is_subdomain = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*").fullmatch


def protocol(path: str, value: str | None) -> Protocol:
    """Return TCP (the default), UDP or SCTP."""
    found = _PROTOCOLS.get(value)
    if found is None:
        raise Fault(path, f"must be TCP, UDP or SCTP, is {shown(value)}")
    return found


def number(path: str, value: int, first: int, last: int) -> int:
    """Return a number within its range, both ends allowed."""
    if not first <= value <= last:
        raise Fault(path, f"must be between {first} and {last}, is {shown(value)}")
    return value


def required_port(path: str, value: int | None) -> int:
    """Return a port, which must be stated."""
    if value is None:
        raise Fault(path, "must be given")
    return number(path, value, 1, 65535)


def one_of(path: str, value: str, allowed: Iterable[str]) -> None:
    """Check a value against the words the API knows."""
    words = list(allowed)
    if value not in words:
        listed = f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
        raise Fault(path, f"must be {listed}, is {shown(value)}")


class Subject(msgspec.Struct, gc=False):
    """The object being read: its place, checked, and a list for the faults it stands without (see ``ObjectError.kept``)."""

    namespace: str
    name: str
    skipped: list[Fault]


# -- names and labels ------------------------------------------------------------------------------------------------


def label_name(path: str, value: str) -> str:
    """Return a DNS label (a Service, Namespace or port name), interned."""
    if not _is_label(value):
        raise Fault(path, f'must be lower case letters, digits and "-", at most 63, is {shown(value)}')
    return intern(value)


def subdomain_name(path: str, value: str) -> str:
    """Return a DNS subdomain (the name of anything else)."""
    if not _is_subdomain(value) or len(value) > 253:
        raise Fault(path, f'must be lower case letters, digits, "-" and ".", at most 253, is {shown(value)}')
    return value


def labels(value: Mapping[str, str] | None) -> Labels:
    """Return labels as an immutable mapping; all empty ones are one object."""
    return Map(value) if value else NO_LABELS


def notes(value: Mapping[str, str] | None) -> Labels:
    """Return annotations, without kubectl's copy of the object; checks their size and tells it, not their content."""
    if not value:
        return NO_LABELS
    size = sum([len(key.encode(errors="replace")) + len(text.encode(errors="replace")) for key, text in value.items()])
    if size > MAX_ANNOTATION_BYTES:
        raise Fault("metadata.annotations", f"must be at most {MAX_ANNOTATION_BYTES} bytes together, are {size} bytes")
    if LAST_APPLIED in value:
        return labels({key: text for key, text in value.items() if key != LAST_APPLIED})
    return Map(value)


@lru_cache(maxsize=16384)
def node_name(path: str, value: str) -> str:
    """Return the name of a node; there are few beside what names them."""
    return intern(subdomain_name(path, value))


# -- addresses -------------------------------------------------------------------------------------------------------


def _sloppy(text: str) -> str:
    """Take leading zeros off each dotted part."""
    head, colon, tail = text.rpartition(":")
    parts = [part.lstrip("0") or "0" if part.isascii() and part.isdigit() else part for part in tail.split(".")]
    return f"{head}{colon}{'.'.join(parts)}" if len(parts) == 4 else text


def parse_ip(text: str) -> IPAddress:
    """Read one address. Raises ValueError. An IPv4 address in IPv6 clothes (``::ffff:1.2.3.4``) is the IPv4 address.

    inet_pton is many times faster than ``ipaddress`` and as strict.
    """
    if ":" not in text:
        try:
            return IPv4Address(inet_pton(AF_INET, text))
        except OSError:
            return IPv4Address(_sloppy(text))
    try:
        packed = inet_pton(AF_INET6, text)
    except OSError:
        packed = IPv6Address(_sloppy(text) if "%" not in text else "").packed
    found = IPv6Address(packed)
    return found.ipv4_mapped or found


def parse_cidr(text: str) -> IPNetwork:
    """Read one CIDR; bits behind the prefix are dropped. Raises ValueError, also where there is no ``/``."""
    address, slash, length = text.partition("/")
    if not slash or not (length.isascii() and length.isdigit()):
        raise ValueError(text)
    if ":" in address:
        packed = IPv6Address(_sloppy(address) if "%" not in address else "")
        return IPv6Network((packed, int(length)), strict=False)
    return IPv4Network((IPv4Address(_sloppy(address)), int(length)), strict=False)


def ip(path: str, value: str | None) -> IPAddress:
    """Return an address."""
    try:
        return parse_ip(value or "")
    except ValueError:
        raise Fault(path, f"must be an IP address, is {shown(value)}") from None


def routable_ip(path: str, value: str | None) -> IPAddress:
    """Return an address traffic may be sent to: as the API server has it, none of those with a special meaning.

    An endpoint or external address of 127.0.0.1 would turn a Service into a door to every node's own ports.
    """
    plain = plain_ipv4(value or "")
    if plain is not None:
        return plain
    found = ip(path, value)
    if _is_special(found):
        raise Fault(path, f"must not be an unspecified, loopback or link-local address, is {shown(value)}")
    return found


def plain_ipv4(text: str) -> IPv4Address | None:
    """Return an IPv4 address in plain spelling that is certainly routable, as nearly all are; None says nothing about the rest."""
    try:
        packed = inet_pton(AF_INET, text)
    except (OSError, ValueError):
        return None
    return None if packed[0] in _SPECIAL_BYTES else IPv4Address(int.from_bytes(packed, "big"))


_SPECIAL_BYTES = frozenset({0, 127, 169, 224})
"""First bytes of IPv4 addresses that may be special: tells all others, nearly always enough, at once."""


def _is_special(address: IPAddress) -> bool:
    """Tell ::, ::1, 0.0.0.0, 127/8, 169.254/16, fe80::/10 and link-local multicast; by number, as this runs for each endpoint."""
    n = int(address)
    if address.version == 4:
        return n == 0 or n >> 24 == 127 or n >> 16 == 0xA9FE or n >> 8 == 0xE00000
    return n <= 1 or n >> 118 == 0xFE80 >> 6 or n >> 112 == 0xFF02


def cidr(path: str, value: str | None) -> IPNetwork:
    """Return a network."""
    try:
        return parse_cidr(value or "")
    except ValueError:
        raise Fault(path, f"must be a CIDR such as 10.0.0.0/8, is {shown(value)}") from None


def one_per_family(path: str, found: Iterable[IPAddress | IPNetwork]) -> None:
    """Check that a list has at most one entry of each family."""
    seen: set[int] = set()
    for i, entry in enumerate(found):
        if entry.version in seen:
            raise Fault(f"{path}[{i}]", f"must be the only one of IPv{entry.version}, is {shown(str(entry))}")
        seen.add(entry.version)
