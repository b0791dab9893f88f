"""Hanging a pod on its node, and looking at what hangs there; all in the network namespace of the calling thread.

    .-- pod ---------------.            .-- node ------------------------------------.
    |  eth0   MAC p        |   veth     |  veth1a2b3c4d   MAC n                      |
    |  10.244.1.5/32  -----|------------|--- alias nodeplane-cni/<network>/<id>/eth0 |
    '----------------------'            '--------------------------------------------'

The node's end has a random name; its alias says whose it is, so that it is found again when nothing else is left. Which addresses
and routes there should be is for the caller. Few imports, no pyroute2: a program that is executed for each pod starts with this.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kernelstate.errors import KernelRefusedError
from kernelstate.linux import netns_file
from kernelstate.linux.pod_codec import (
    IFADDR,
    NDMSG,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETNEIGH,
    RTM_GETROUTE,
    RTMSG,
    IPAddress,
    IPInterface,
    LinkFacts,
    NameAndMac,
    PodRoute,
    address_message,
    del_link,
    links_question,
    neigh_message,
    new_bridge,
    new_veth,
    read_address,
    read_link,
    read_neigh,
    read_route,
    route_message,
    set_hairpin,
    set_master,
    set_up,
)
from kernelstate.linux.rtnetlink import Request, RouteSocket

ALIAS = "nodeplane-cni"
NAME_ATTEMPTS = 8


def alias_of(network: str, container: str, ifname: str) -> str:
    """Return the mark of a node's end: whose attachment it is."""
    return f"{ALIAS}/{network}/{container}/{ifname}"


def owner_of(alias: str, network: str) -> tuple[str, str] | None:
    """Return container and interface that a mark names, if it is one of ours and of this network."""
    words = alias.split("/")
    return (words[2], words[3]) if len(words) == 4 and words[:2] == [ALIAS, network] else None


def random_mac() -> str:
    """Return a MAC for one end: locally administered, unicast."""
    raw = bytearray(os.urandom(6))
    raw[0] = raw[0] & 0xFC | 0x02
    return raw.hex(":")


def write_sysctl(name: str, value: str, *, optional: bool = False) -> None:
    """Write a parameter below /proc/sys/net unless it is so already; ``optional`` where the kernel may not have it."""
    path = f"/proc/sys/net/{name}"
    try:
        with open(path, "rb") as file:
            if file.read().strip() == value.encode():
                return
        with open(path, "wb") as file:
            file.write(value.encode())
    except FileNotFoundError as error:
        if not optional:
            raise KernelRefusedError("write sysctl", path, str(error.strerror)) from error
    except OSError as error:
        raise KernelRefusedError("write sysctl", path, str(error.strerror)) from error


class PodLinks:
    """Links of one network namespace; good for the one it was opened in."""

    def __init__(self) -> None:
        self._sock = RouteSocket()

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    # -- making ------------------------------------------------------------------------------------------------------

    def make_pair(self, netns: str, far: NameAndMac, near_mac: str, mtu: int, alias: str) -> str:
        """Make a veth pair, its far end in the namespace of file ``netns``, the near end up; return the near end's name.

        Raises KernelRefusedError, with ``File exists`` for a far end that is there already; then nothing is left.
        """
        there = netns_file.open_netns(netns)
        try:
            for _ in range(NAME_ATTEMPTS):
                near = f"veth{os.urandom(4).hex()}"
                answer = self._sock.execute([new_veth((near, near_mac), far, there, mtu)])[0]
                if answer.code != errno.EEXIST or not self.exists(near):
                    break
        finally:
            os.close(there)
        if answer.code:
            raise KernelRefusedError("create veth", f"{far[0]} in {netns}", answer.words)
        try:
            self._do(f"set up {near}", [set_up(near, alias)])
        except BaseException:
            self.delete(near)
            raise
        return near

    def make_bridge(self, name: str, mtu: int) -> int:
        """Make a bridge unless it is there; return its index. Raises KernelRefusedError, also when the name is another link's."""
        answer = self._sock.execute([new_bridge(name, random_mac(), mtu)])[0]
        if answer.code not in {0, errno.EEXIST}:
            raise KernelRefusedError("create bridge", name, answer.words)
        if answer.code:
            found = self.link(name)
            if found is None or found.kind != "bridge":
                raise KernelRefusedError(
                    "create bridge", name, f"a link of this name is there, of kind {found and found.kind!r}"
                )
            if not found.up:
                self._do(f"set up {name}", [set_up(name)])
            return found.ifindex
        return index_of(name)

    def plug(self, name: str, bridge: int, *, hairpin: bool) -> None:
        """Make a link a port of a bridge."""
        self._do(f"make {name} a port", [set_master(name, bridge), *([set_hairpin(name)] if hairpin else [])])

    def configure(
        self,
        name: str,
        addresses: Sequence[IPInterface] = (),
        neighbours: Sequence[tuple[IPAddress, str]] = (),
        routes: Sequence[PodRoute] = (),
        *,
        replace: bool = False,
    ) -> None:
        """Set a link up and give it addresses, permanent neighbours and routes, in this order and in one message.

        ``replace`` lets a route take the place of another to the same destination. Raises KernelRefusedError.
        """
        index = index_of(name)
        requests = [set_up(name)]
        requests += [address_message(one, index) for one in addresses]
        requests += [neigh_message(address, mac, index) for address, mac in neighbours]
        requests += [route_message(route, index, replace=replace) for route in routes]
        what = ["set up", *(f"add address {a} to" for a in addresses), *(f"add neighbour {a} to" for a, _ in neighbours)]
        what += [f"add route {r.destination} via {r.gateway or 'no gateway'} to" for r in routes]
        for words, answer in zip(what, self._sock.execute(requests), strict=True):
            if answer.code:
                raise KernelRefusedError(words, name, answer.words)

    def set_addresses(self, index: int, add: Sequence[IPInterface], delete: Sequence[IPInterface] = ()) -> None:
        """Add and delete addresses of a link; one that is there, or gone, already is success."""
        requests = [address_message(one, index, delete=True) for one in delete]
        requests += [address_message(one, index) for one in add]
        for one, answer in zip((*delete, *add), self._sock.execute(requests), strict=True):
            if answer.code not in {0, errno.EEXIST, errno.EADDRNOTAVAIL}:
                raise KernelRefusedError("set address", str(one), answer.words)

    def delete(self, name: str) -> None:
        """Delete a link; gone already is success."""
        answer = self._sock.execute([del_link(name)])[0]
        if answer.code not in {0, errno.ENODEV}:
            raise KernelRefusedError("delete link", name, answer.words)

    def _do(self, what: str, requests: Sequence[Request]) -> None:
        for answer in self._sock.execute(requests):
            if answer.code:
                raise KernelRefusedError(what, "over rtnetlink", answer.words)

    # -- looking -----------------------------------------------------------------------------------------------------

    def exists(self, name: str) -> bool:
        """Whether a link of this name is there."""
        try:
            index_of(name)
        except KernelRefusedError:
            return False
        return True

    def links(self) -> list[LinkFacts]:
        """Return all links."""
        return [read_link(message) for message in self._sock.dump(RTM_GETLINK, links_question(), "links")]

    def link(self, name: str) -> LinkFacts | None:
        """Return a link by name, or None."""
        return next((one for one in self.links() if one.name == name), None)

    def addresses(self, index: int) -> list[IPInterface]:
        """Return the addresses of a link."""
        found = [read_address(one) for one in self._sock.dump(RTM_GETADDR, IFADDR.pack(0, 0, 0, 0, 0), "addresses")]
        return [address for link, address in found if link == index]

    def routes(self, index: int = 0) -> list[PodRoute]:
        """Return the unicast routes through a link (0: any), of all tables."""
        found = [read_route(one) for one in self._sock.dump(RTM_GETROUTE, RTMSG.pack(*bytes(9)), "routes")]
        return [one[1] for one in found if one is not None and index in {0, one[0]}]

    def neighbours(self, index: int) -> dict[IPAddress, str]:
        """Return the permanent neighbours of a link: address to MAC."""
        found = [read_neigh(one) for one in self._sock.dump(RTM_GETNEIGH, NDMSG.pack(0, 0, 0, 0, 0), "neighbours")]
        return {one[1]: one[2] for one in found if one is not None and one[0] == index}


def index_of(name: str) -> int:
    """Return a link's index. Raises KernelRefusedError where there is none."""
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        raise KernelRefusedError("find link", name, str(error.strerror)) from error


@contextmanager
def open_links() -> Iterator[PodLinks]:
    """Open the links of the calling thread's namespace."""
    links = PodLinks()
    try:
        yield links
    finally:
        links.close()


@contextmanager
def links_in(netns: str) -> Iterator[PodLinks]:
    """Move into the namespace of file ``netns`` and open its links, then move back. Raises KernelRefusedError."""
    with netns_file.inside_file(netns), open_links() as links:
        yield links
