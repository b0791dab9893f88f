"""The way that merges segments: a veth pair beside the tunnel, for what GRO could not do before packets were unwrapped.

    eth0 --decap--> flannel0-out ======== flannel0-in --arrive--> flannel0
                       no TSO      ring       GRO

A card's GRO does not look into the tunnel, so each segment of a TCP stream is unwrapped alone; from there to the pod it would cost
what a whole packet costs. A veth link puts its peer's packets through GRO if that is on and the sender does no TSO (veth.c,
veth_skb_is_eligible_for_gro). Neither end has an address or takes part in IPv6; both are gone with ``remove``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from kernelstate.errors import KernelRefusedError
from kernelstate.linux import ethtool, sysctl
from kernelstate.linux.link_codec import (
    IFF_UP,
    IFINFO,
    IFLA_IFALIAS,
    IFLA_IFNAME,
    IFLA_INFO_DATA,
    IFLA_INFO_KIND,
    IFLA_LINKINFO,
    IFLA_MTU,
    RTM_DELLINK,
    RTM_GETLINK,
    RTM_NEWLINK,
)
from kernelstate.linux.rtnetlink import NLM_F_CREATE, NLM_F_EXCL, Request, RouteSocket, attribute, attributes, number

ALIAS = "nodeplane tunnel"
"""Ours, but not the link reconciler's, which knows its links by another word."""
VETH_INFO_PEER = 1
SET_GRO = 0x2C
MTU = 65535
"""What is merged is larger than the MTU anyway, and what is not has been through the uplink's."""


def names(link: str) -> tuple[str, str]:
    """Return the names of both ends: where packets go in, and where they come out."""
    return f"{link}-out", f"{link}-in"


def find(link: str) -> tuple[int, int]:
    """Return the indices of both ends; zeros if they are not there."""
    try:
        enter, leave = (socket.if_nametoindex(name) for name in names(link))
    except OSError:
        return 0, 0
    return enter, leave


def make(link: str) -> tuple[int, int]:
    """Make the pair beside a tunnel's link, anew if it is there; return both indices. Raises KernelRefusedError."""
    remove(link)
    enter, leave = names(link)
    with contextlib.closing(RouteSocket()) as netlink:
        _do(netlink, Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, _pair(enter, leave)), enter)
        try:
            for name in (enter, leave):
                with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
                    sysctl.write(f"net.ipv6.conf.{name}.disable_ipv6", 1)
            ethtool.switch(enter, ethtool.SET_TSO, on=False)
            ethtool.switch(leave, SET_GRO, on=True)
            for name in (enter, leave):
                up = IFINFO.pack(0, 0, socket.if_nametoindex(name), IFF_UP, IFF_UP)
                _do(netlink, Request(RTM_NEWLINK, 0, up + attribute(IFLA_IFALIAS, ALIAS.encode() + b"\0")), name)
        except OSError as error:
            remove(link)
            raise KernelRefusedError("set up link", enter, os.strerror(error.errno or 0)) from error
    return find(link)


def remove(link: str) -> bool:
    """Remove the pair; whether it was there. A link of that name that is not ours is refused. Raises KernelRefusedError."""
    enter = names(link)[0]
    try:
        index = socket.if_nametoindex(enter)
    except OSError:
        return False
    with contextlib.closing(RouteSocket()) as netlink:
        found = netlink.dump(RTM_GETLINK, IFINFO.pack(0, 0, 0, 0, 0), "links")
        mine = [attributes(m.body, IFINFO.size) for m in found if IFINFO.unpack_from(m.body)[2] == index]
        alias = mine[0].get(IFLA_IFALIAS, b"").rstrip(b"\0").decode(errors="replace") if mine else ""
        if mine and alias not in {ALIAS, ""}:
            raise KernelRefusedError("remove link", enter, f"is somebody else's: its alias is {alias!r}")
        answer = netlink.execute([Request(RTM_DELLINK, 0, IFINFO.pack(0, 0, index, 0, 0))])[0]
    if answer.code not in {0, errno.ENODEV}:
        raise KernelRefusedError("remove link", enter, answer.words)
    return True


def _pair(enter: str, leave: str) -> bytes:
    peer = IFINFO.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, leave.encode() + b"\0") + number(IFLA_MTU, MTU)
    kind = attribute(IFLA_INFO_KIND, b"veth\0") + attribute(IFLA_INFO_DATA, attribute(VETH_INFO_PEER, peer))
    own = attribute(IFLA_IFNAME, enter.encode() + b"\0") + number(IFLA_MTU, MTU)
    return IFINFO.pack(0, 0, 0, 0, 0) + own + attribute(IFLA_LINKINFO, kind)


def _do(netlink: RouteSocket, request: Request, name: str) -> None:
    answer = netlink.execute([request])[0]
    if answer.code:
        raise KernelRefusedError("set up link", name, answer.words)
