"""Makes TUN links that stay when the process that reads them ends, in the network namespace of the calling thread.

rtnetlink can read and delete a TUN, but not make one: that takes an ioctl on /dev/net/tun. Whether it stays, and which queues and
headers it has, is settled when it is made. Source: Documentation/networking/tuntap.rst, include/uapi/linux/if_tun.h.
"""

from __future__ import annotations

import fcntl
import os
import struct

DEVICE = "/dev/net/tun"
TUNSETIFF, TUNSETPERSIST = 0x400454CA, 0x400454CB
IFF_TUN, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x0100, 0x1000, 0x4000
FLAGS = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE
_IFREQ = struct.Struct("16sH22x")


def make_tun(name: str) -> str:
    """Make a persistent TUN with several queues and virtio headers; return the kernel's words, empty for done."""
    try:
        queue = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"{DEVICE}: {error.strerror}"
    try:
        fcntl.ioctl(queue, TUNSETIFF, _IFREQ.pack(name.encode(), FLAGS))
        fcntl.ioctl(queue, TUNSETPERSIST, 1)
    except OSError as error:
        return f"{DEVICE}: {error.strerror}"
    finally:
        os.close(queue)
    return ""
