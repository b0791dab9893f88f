"""What the kernel tells about changes of nftables tables: whose are touched, and how many commits there have been.

    commit --> NEWCHAIN table=nodeplane, NEWSETELEM table=nodeplane, ... NEWGEN id=8      to the group NFNLGRP_NFTABLES

A socket in that group. Everybody's commits are told, ours as well; so for the time of a write of our own the socket leaves the
group, which also spares the kernel to tell us a hundred thousand elements. Nothing is lost: the count of commits is taken before
leaving and after joining again, and where it went up by more than ours, something unknown has happened.

                 read count    leave    commit    join    read count
    others:   told and counted |  counted, not told  | told and counted

Messages of rules that others' tables hold cost a look at their head. If more comes than the buffer holds the kernel says so
(ENOBUFS), and that something was missed is all that is known. What packets put into dynamic sets and timeouts take out is told
by nobody, and is nobody's change.

Source: nf_tables_commit in net/netfilter/nf_tables_api.c, include/uapi/linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection

from kernelstate.linux.nfnetlink import NETLINK_NETFILTER
from kernelstate.objects.address import Family
from kernelstate.objects.nftables import TableKey

SOL_NETLINK, ADD_MEMBERSHIP, DROP_MEMBERSHIP = 270, 1, 2
GROUP_NFTABLES = 7
SO_RCVBUFFORCE = 33
BUFFER = 4 << 20
"""Bytes. Some ten thousand elements that somebody else adds at once."""
DATAGRAMS = 100_000
"""So many are read in one go; more is a storm, and answered as an overflow."""

FAMILIES: dict[int, Family] = {socket.AF_INET: 4, socket.AF_INET6: 6}
_HEADER = struct.Struct("=IHHIIBBHHH")  # nlmsghdr, nfgenmsg, then the head of the first attribute
_NAME = 24


class NftEvents:
    """Changes of tables in the network namespace in which this was made."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        self._socket.setblocking(False)
        self._socket.bind((0, 0))
        self.join()

    def fileno(self) -> int:
        """Return the descriptor to select on."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def join(self) -> None:
        """Listen to all commits from now on."""
        self._socket.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, GROUP_NFTABLES)

    def leave(self) -> None:
        """Listen to none; what has been told already can still be read."""
        self._socket.setsockopt(SOL_NETLINK, DROP_MEMBERSHIP, GROUP_NFTABLES)

    def drain(self, keys: Collection[TableKey]) -> frozenset[TableKey] | None:
        """Return which of the tables were touched since the last call; None if something was missed. Never blocks."""
        marks = {name: name.encode() + b"\0" for _, name in keys}
        found: set[TableKey] = set()
        lost = False
        for _ in range(DATAGRAMS):
            try:
                data = self._socket.recv(1 << 18)
            except BlockingIOError:
                return None if lost else frozenset(found)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            for name, mark in marks.items():
                if mark in data:
                    found.update(TableKey(family, name) for family in _touched(data, mark))
        return None


def _touched(data: bytes, mark: bytes) -> set[Family]:
    """Return the families in which messages of a datagram are about the table: their first attribute is its name."""
    families: set[Family] = set()
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, _, _, _, _, family, _, _, size, kind = _HEADER.unpack_from(data, offset)
        if kind == 1 and family in FAMILIES and data[offset + _NAME : offset + _NAME - 4 + size] == mark:
            families.add(FAMILIES[family])
        if length < _HEADER.size - 4:
            break
        offset += (length + 3) & ~3
    return families
