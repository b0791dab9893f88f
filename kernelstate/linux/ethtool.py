"""One switch of a link at a time, as ``ethtool -K`` sets it, in the network namespace of the calling thread.

    tx-checksum off: the kernel finishes every checksum before it hands a packet to the link

Source: include/uapi/linux/ethtool.h (struct ethtool_value), net/ethtool/ioctl.c.
"""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct

SIOCETHTOOL = 0x8946
GET_TX_CHECKSUM, SET_TX_CHECKSUM = 0x16, 0x17
SET_TSO, SET_GSO = 0x1F, 0x24
_VALUE = struct.Struct("=II")
_IFREQ = struct.Struct("16sP16x")


def tx_checksum(link: str) -> bool:
    """Whether checksums are left to the link to finish. Raises OSError."""
    return bool(_call(link, GET_TX_CHECKSUM, 0))


def switch(link: str, command: int, *, on: bool) -> None:
    """Turn one of the switches. Raises OSError."""
    _call(link, command, int(on))


def _call(link: str, command: int, value: int) -> int:
    buffer = ctypes.create_string_buffer(_VALUE.pack(command, value), _VALUE.size)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        # The kernel follows the pointer and writes its answer behind it.
        fcntl.ioctl(sock, SIOCETHTOOL, _IFREQ.pack(link.encode(), ctypes.addressof(buffer)))
    return int(_VALUE.unpack(buffer.raw)[1])
