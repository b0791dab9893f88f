"""A link's offloads by their names, as ``ethtool -k`` prints them, in the network namespace of the calling thread.

    names   tx-tcp-segmentation, tx-udp_tnl-segmentation, rx-gro, ...     ETHTOOL_GSTRINGS of ETH_SS_FEATURES
    bits    one for each name, in words of 32                             ETHTOOL_GFEATURES, ETHTOOL_SFEATURES

Here because Debian's ethtool is one more package, and a fresh link of every path would start it twice.
Source: include/uapi/linux/ethtool.h, net/ethtool/ioctl.c.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Mapping

from kernelstate.errors import KernelRefusedError

SIOCETHTOOL = 0x8946
GSTRINGS, GSSET_INFO, GFEATURES, SFEATURES = 0x1B, 0x37, 0x3A, 0x3B
ETH_SS_FEATURES = 4
NAME = 32
"""Bytes a name has (ETH_GSTRING_LEN)."""
_BLOCK = struct.Struct("=IIII")  # available, requested, active, never changed


def features(link: str) -> dict[str, bool]:
    """Return what the link has, and whether it is on. Raises KernelRefusedError."""
    names = _names(link)
    blocks = (len(names) + 31) // 32
    answer = _ask(link, struct.pack("=II", GFEATURES, blocks) + bytes(blocks * _BLOCK.size))
    active = [_BLOCK.unpack_from(answer, 8 + i * _BLOCK.size)[2] for i in range(blocks)]
    return {name: bool(active[i // 32] >> i % 32 & 1) for i, name in enumerate(names) if name}


def set_features(link: str, wanted: Mapping[str, bool]) -> dict[str, bool]:
    """Turn features on and off; return those that are not as before, as they were. Raises KernelRefusedError.

    The kernel may turn more than was asked for: ``tx-tcp-mangleid-segmentation`` goes with ``tx-tcp-segmentation``. A name that
    it does not have is passed over: there is then nothing to turn off.
    """
    before = features(link)
    names = _names(link)
    words = [[0, 0] for _ in range((len(names) + 31) // 32)]  # valid, requested
    for i, name in enumerate(names):
        if wanted.get(name, before.get(name)) != before.get(name):
            words[i // 32][0] |= 1 << i % 32
            words[i // 32][1] |= wanted[name] << i % 32
    _ask(link, struct.pack("=II", SFEATURES, len(words)) + b"".join(struct.pack("=II", *word) for word in words))
    after = features(link)
    for name, on in wanted.items():
        if after.get(name, on) != on:
            raise KernelRefusedError("change offload", f"{name} of {link}", f"stays {'off' if on else 'on'}")
    return {name: before[name] for name in before if after[name] != before[name]}


def change_some(link: str, is_meant: Callable[[str], bool], *, on: bool) -> dict[str, bool]:
    """Turn all features on or off whose name is meant; return those that are not as before, as they were."""
    return set_features(link, {name: on for name in features(link) if is_meant(name)})


def segments_in_hardware(name: str) -> bool:
    """Whether a feature lets packets larger than the MTU leave through the link: TSO, USO and those of tunnels.

    Not ``tx-generic-segmentation``: that is the kernel cutting them itself right before the link.
    """
    return name.startswith("tx-") and name.endswith("-segmentation") and name != "tx-generic-segmentation"


def _names(link: str) -> list[str]:
    """Return the name of each bit; the kernel leaves some empty."""
    count = struct.unpack_from("=I", _ask(link, struct.pack("=IIQI", GSSET_INFO, 0, 1 << ETH_SS_FEATURES, 0)), 16)[0]
    answer = _ask(link, struct.pack("=III", GSTRINGS, ETH_SS_FEATURES, count) + bytes(count * NAME))
    return [answer[12 + i * NAME : 12 + (i + 1) * NAME].split(b"\0")[0].decode() for i in range(count)]


def _ask(link: str, request: bytes) -> bytes:
    """Have the kernel answer a request in place. Raises KernelRefusedError."""
    data = array.array("B", request)
    ifreq = struct.pack("=16sQ8x", link.encode(), data.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            fcntl.ioctl(sock, SIOCETHTOOL, ifreq)
        except OSError as error:
            raise KernelRefusedError("ask for offloads", link, os.strerror(error.errno or 0)) from error
    return data.tobytes()
