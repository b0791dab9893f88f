"""What the kernel tells about changes of links, addresses, routes and neighbours, for whoever waits for it.

A socket in multicast groups of rtnetlink. Whoever selects on ``fileno`` is woken by a change and asks for messages. Neighbour
tables of other links change all the time; such messages cost a look at their header. If more comes than the buffer holds, the
kernel says so (ENOBUFS), and that something was missed is then all that is known.

Source: rtnetlink(7), enum rtnetlink_groups in include/uapi/linux/rtnetlink.h.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from kernelstate.linux.link_codec import RTM_DELADDR, RTM_DELLINK, RTM_NEWADDR, RTM_NEWLINK
from kernelstate.linux.rtnetlink import NETLINK_ADD_MEMBERSHIP, RECEIVE, SOL_NETLINK, Message, frames_of, open_socket

GROUP_LINK, GROUP_NEIGH, GROUP_IPV4_IFADDR, GROUP_IPV4_ROUTE, GROUP_IPV6_IFADDR, GROUP_IPV6_ROUTE = 1, 3, 5, 7, 9, 11
ALL_GROUPS = (GROUP_LINK, GROUP_NEIGH, GROUP_IPV4_IFADDR, GROUP_IPV4_ROUTE, GROUP_IPV6_IFADDR, GROUP_IPV6_ROUTE)
"""Forwarding entries are told in the neighbours' group, in the bridge family."""
HOST_GROUPS = (GROUP_LINK, GROUP_IPV4_IFADDR, GROUP_IPV6_IFADDR)
BUFFER = 4 << 20
"""Bytes. A thousand peers made at once are three thousand events."""
DATAGRAMS = 100_000
"""So many are read in one go; more is a storm, and answered as an overflow."""


class EventSocket:
    """Messages of the given groups, from the network namespace in which it was made."""

    def __init__(self, groups: Iterable[int]) -> None:
        self._sock = open_socket(timeout=0.0, buffer=BUFFER)
        self._sock.bind((0, 0))
        for group in groups:
            self._sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)

    def fileno(self) -> int:
        """Return the descriptor to select on."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close it."""
        self._sock.close()

    def read(self) -> list[Message] | None:
        """Return the messages since the last call; None if some were lost. Never blocks."""
        found: list[Message] = []
        lost = False
        for _ in range(DATAGRAMS):
            try:
                data = self._sock.recv(RECEIVE)
            except BlockingIOError:
                return None if lost else found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            found += [Message(kind, body) for kind, _, _, body in frames_of(data)]
        return None


class LinkEvents:
    """Whether links or addresses of the node changed: what its addresses and its uplink are found from."""

    def __init__(self) -> None:
        self._socket = EventSocket(HOST_GROUPS)

    def fileno(self) -> int:
        """Return the descriptor to select on."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def drain(self) -> bool:
        """Read what there is; whether any of it (or anything lost) was about a link or an address. Never blocks."""
        messages = self._socket.read()
        return messages is None or any(m.type in _OF_HOST for m in messages)


_OF_HOST = frozenset({RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR})
