"""What the kernel tells of a table's chains, rules and sets, made comparable, and what it would tell of a desired table.

    desired table --libnftables--> a namespace made for the purpose --netlink--> Shape --.
                                                                                           +-- same bytes: equal
                                   the namespace we work in        --netlink--> Shape --'

Rules are compared as the bytes that the kernel keeps of them, so nothing has to understand what a library made of a text. Left
out is what differs between equal tables: handles, and the running names of anonymous sets, for which their elements stand.

Source: nf_tables_fill_rule_info, _chain_info and _set in net/netfilter/nf_tables_api.c.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from typing import NamedTuple

from kernelstate.diff_nftables import diff_tables
from kernelstate.errors import KernelRefusedError
from kernelstate.linux import netns
from kernelstate.linux import nft_codec as codec
from kernelstate.linux.nfnetlink import NfNetlink, attribute, attributes
from kernelstate.linux.nft_library import Library
from kernelstate.objects.nftables import Table, TableKey
from kernelstate.text import nft

PROTOCOL_FAMILY: dict[int, int] = {4: socket.AF_INET, 6: socket.AF_INET6}

_CHAIN_NAME, _CHAIN_PARTS = 3, (4, 5, 7, 10, 12)  # hook, policy, type, flags, comment
_SET_NAME, _SET_FLAGS, _SET_PARTS = 2, 3, (3, 4, 5, 6, 7, 9, 11, 13)  # flags, types and lengths, size, timeout, declaration
_EXPR_NAME, _EXPR_DATA, _EXPR_SET = 1, 2, 1
_ANONYMOUS, _MAP = 0x1, 0x8

Form = tuple[bytes, ...]


class ChainForm(NamedTuple):
    """A chain: its hook with what belongs to it, and its rules."""

    base: Form
    rules: tuple[Form, ...]


class SetForm(NamedTuple):
    """A set without its elements."""

    parts: Form
    is_map: bool


class Shape(NamedTuple):
    """A table without the elements of its named sets."""

    chains: dict[str, ChainForm]
    sets: dict[str, SetForm]


def read_shape(netlink: NfNetlink, key: TableKey) -> Shape:
    """Read a table. Raises KernelRefusedError."""
    reader = _Reader(netlink, key)
    sets = reader.sets()
    return Shape(reader.chains(), sets)


def model(key: TableKey, desired: Table) -> Shape:
    """Return what the kernel would tell of a desired table; chains and sets that it refuses are left out.

    Empty where a namespace cannot be made: then nothing is known to be equal. Raises MissingFeatureError.
    """
    plan = diff_tables(key, None, Table(desired.chains, desired.sets, {}), None)

    def load() -> Shape:
        library = Library()
        try:
            library.run(plan.text())
            refused: set[str] = set()
        except KernelRefusedError:
            refused = _load_in_pieces(library, key, desired)
        with NfNetlink() as netlink:
            shape = read_shape(netlink, key)
        return Shape({name: form for name, form in shape.chains.items() if name not in refused}, shape.sets)

    try:
        return netns.call_apart(load)
    except KernelRefusedError:
        return Shape({}, {})


def _load_in_pieces(library: Library, key: TableKey, desired: Table) -> set[str]:
    """Load what can be; returns the chains that could not be filled."""
    library.run(nft.add_table(key))
    for named in desired.sets.values():
        with contextlib.suppress(KernelRefusedError):
            library.run(nft.add_set(key, named))
    for name, chain in desired.chains.items():
        with contextlib.suppress(KernelRefusedError):
            library.run(nft.add_chain(key, name, chain.hook))
    refused = set()
    for name, chain in desired.chains.items():
        try:
            library.run("\n".join([nft.flush_chain(key, name), *nft.add_rules(key, name, chain.rules)]))
        except KernelRefusedError:
            refused.add(name)
    return refused


class _Reader:
    def __init__(self, netlink: NfNetlink, key: TableKey) -> None:
        self._netlink = netlink
        self._family = PROTOCOL_FAMILY[key.family]
        self._table = codec.text(key.name)
        self._anonymous: dict[bytes, bytes] = {}  # name to what it holds

    def sets(self) -> dict[str, SetForm]:
        """Return the named sets; before chains, whose rules may have anonymous ones."""
        found: dict[str, SetForm] = {}
        for data, attrs in self._dump("sets", codec.GETSET):
            name = data[slice(*attrs[_SET_NAME])]
            parts = _bytes(data, attrs, _SET_PARTS)
            flags = int.from_bytes(parts[0], "big")
            if flags & _ANONYMOUS:
                self._anonymous[name] = b""
            else:
                found[name.rstrip(b"\0").decode()] = SetForm(parts, bool(flags & _MAP))
        for name in self._anonymous:
            payload = attribute(codec.ELEM_LIST_SET, name)
            dump = self._dump("elements", codec.GETSETELEM, payload)
            lists = [(data, attrs.get(codec.ELEM_LIST_ELEMENTS, (0, 0))) for data, attrs in dump]
            self._anonymous[name] = b"".join(sorted(data[start:end] for data, (start, end) in lists))
        return found

    def chains(self) -> dict[str, ChainForm]:
        """Return the chains with their rules."""
        rules: dict[bytes, list[Form]] = {}
        for data, attrs in self._dump("rules", codec.GETRULE):
            form = (*self._expressions(data, *attrs[codec.RULE_EXPRESSIONS]), *_bytes(data, attrs, (codec.RULE_USERDATA,)))
            rules.setdefault(data[slice(*attrs[codec.RULE_CHAIN])], []).append(form)
        found: dict[str, ChainForm] = {}
        for data, attrs in self._dump("chains", codec.GETCHAIN):
            name = data[slice(*attrs[_CHAIN_NAME])]
            found[name.rstrip(b"\0").decode()] = ChainForm(_bytes(data, attrs, _CHAIN_PARTS), tuple(rules.get(name, ())))
        return found

    def _expressions(self, data: bytes, start: int, end: int) -> Iterable[bytes]:
        """Yield the parts of a rule; where an anonymous set is asked, what it holds comes after."""
        for first, last in codec.children(data, start, end):
            parts = attributes(data, first, last)
            yield data[slice(*parts[_EXPR_NAME])]
            if _EXPR_DATA not in parts:
                continue
            inner = attributes(data, *parts[_EXPR_DATA])
            name = data[slice(*inner[_EXPR_SET])] if _EXPR_SET in inner else b""
            if name in self._anonymous:
                yield self._anonymous[name]
                yield b"".join(data[a - 4 : b] for kind, (a, b) in inner.items() if kind != _EXPR_SET)
            else:
                yield data[slice(*parts[_EXPR_DATA])]

    def _dump(self, what: str, message: int, payload: bytes = b"") -> list[tuple[bytes, dict[int, tuple[int, int]]]]:
        """Return what there is of the table; the kernel may tell of other tables as well."""
        payload = attribute(codec.TABLE, self._table) + payload
        dump = self._netlink.dump(f"list nftables {what}", message, self._family, payload)
        found = [(data, attributes(data, start, end)) for data, start, end in dump]
        return [(data, attrs) for data, attrs in found if data[slice(*attrs[codec.TABLE])] == self._table]


def _bytes(data: bytes, attrs: dict[int, tuple[int, int]], kinds: Iterable[int]) -> Form:
    return tuple(data[slice(*attrs.get(kind, (0, 0)))] for kind in kinds)
