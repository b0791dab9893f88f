"""Lets a program see a link's traffic, in the network namespace of the calling thread, and tells whether it still does.

    tcx     a BPF link, pinned: one call exchanges its program between two packets          Linux 6.6
    clsact  a filter on the link's clsact queue, known by its handle and priority           before; ends with the link or the queue

Both go on while nobody of ours runs. Others' programs on the same link are left alone; ours leaves to them what is not ours
(TC_ACT_UNSPEC). Source: include/uapi/linux/bpf.h, Documentation/bpf/libbpf, net/sched/cls_bpf.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from pathlib import Path
from typing import Literal

import msgspec

from kernelstate.errors import KernelRefusedError
from kernelstate.linux import rtnetlink
from kernelstate.linux.libbpf import Descriptor, Options, Program, check, library, open_pin

Direction = Literal["ingress", "egress"]
TCX: dict[Direction, int] = {"ingress": 46, "egress": 47}
TC_POINT: dict[Direction, int] = {"ingress": 1, "egress": 2}
BPF_LINK_TYPE_TCX = 11
BPF_TC_F_REPLACE = 1
HANDLE, PRIORITY = 0x4E50, 0x4E50
"""Of our filters; the priority leaves room for others on both sides."""
RTM_DELQDISC, RTM_GETTFILTER = 37, 46
TC_H_CLSACT, TC_H_MIN_INGRESS, TC_H_MIN_EGRESS = 0xFFFFFFF1, 0xFFFFFFF2, 0xFFFFFFF3
_TCMSG = struct.Struct("=BxHiIII")  # family, interface, handle, parent, info


class _TcHook(Options):
    """libbpf's ``struct bpf_tc_hook``."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("ifindex", ctypes.c_int),
        ("attach_point", ctypes.c_int),
        ("parent", ctypes.c_uint32),
    )


class _TcOptions(Options):
    """libbpf's ``struct bpf_tc_opts``."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("prog_fd", ctypes.c_int),
        ("flags", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("handle", ctypes.c_uint32),
        ("priority", ctypes.c_uint32),
    )


class Hook(msgspec.Struct, frozen=True):
    """One direction of one link's traffic; ``pin`` keeps our attachment there."""

    interface: int
    direction: Direction
    pin: Path

    def __str__(self) -> str:
        return f"{self.direction} of interface {self.interface}"


def attach(program: Program, hook: Hook, *, tcx: bool = True) -> None:
    """Let the program be ours at the hook, instead of an earlier one, without a packet between them. Raises KernelRefusedError.

    ``tcx`` False: as on a kernel without it.
    """
    if not tcx:
        return _attach_filter(program, hook)
    with _pinned(hook) as link:
        if link is not None and _of(link)[1:] == (hook.interface, TCX[hook.direction]):
            return check(library().bpf_link_update(link.fd, program.fd, None), "exchange program", str(hook))
    made = library().bpf_link_create(program.fd, hook.interface, TCX[hook.direction], None)
    if made in {-errno.EINVAL, -errno.EOPNOTSUPP}:
        return _attach_filter(program, hook)
    check(min(made, 0), "attach program", str(hook))
    hook.pin.unlink(missing_ok=True)  # of a link that is gone
    with Descriptor(made, str(hook)) as link:
        link.pin(hook.pin)
    return None


def attached(hook: Hook) -> int:
    """Return the number of the program of ours that is attached; 0 for none. Raises KernelRefusedError."""
    with _pinned(hook) as link:
        if link is not None:
            number, interface, point = _of(link)
            return number if (interface, point) == (hook.interface, TCX[hook.direction]) else 0
    options = _TcOptions(handle=HANDLE, priority=PRIORITY)
    done = library().bpf_tc_query(ctypes.byref(_hook(hook)), ctypes.byref(options))
    if done in {-errno.ENOENT, -errno.EINVAL, -errno.ENODEV}:  # EINVAL: there is no clsact queue
        return 0
    check(done, "look for filter", str(hook))
    return int(options.prog_id)


def detach(hook: Hook) -> bool:
    """Take ours off, and the queue if no other filter uses it; whether there was anything. Raises KernelRefusedError."""
    if hook.pin.exists():
        with _pinned(hook) as link:
            if link is not None:
                # Somebody may hold another descriptor of the link, or the bpffs be seen from elsewhere: end it for all.
                check(library().bpf_link_detach(link.fd), "detach program", str(hook))
        hook.pin.unlink()
        return True
    if not attached(hook):
        return False
    options = _TcOptions(handle=HANDLE, priority=PRIORITY)
    check(library().bpf_tc_detach(ctypes.byref(_hook(hook)), ctypes.byref(options)), "remove filter", str(hook))
    _drop_empty_queue(hook.interface)
    return True


@contextlib.contextmanager
def _pinned(hook: Hook):  # type: ignore[no-untyped-def]
    fd = open_pin(hook.pin)
    if fd is None:
        yield None
        return
    with Descriptor(fd, str(hook)) as link:
        yield link


def _of(link: Descriptor) -> tuple[int, int, int]:
    """Return the program's number, interface and attach point of a tcx link; interface 0: the link went away under it."""
    info = link.info()
    kind, _, program = struct.unpack_from("=3I", info)
    interface, point = struct.unpack_from("=2I", info, 16) if kind == BPF_LINK_TYPE_TCX else (0, 0)
    return program, interface, point


# -- clsact ------------------------------------------------------------------------------------------------------------


def _attach_filter(program: Program, hook: Hook) -> None:
    both = _TcHook(ifindex=hook.interface, attach_point=TC_POINT["ingress"] | TC_POINT["egress"])
    done = library().bpf_tc_hook_create(ctypes.byref(both))
    if done != -errno.EEXIST:
        check(done, "make clsact queue for", str(hook))
    options = _TcOptions(prog_fd=program.fd, flags=BPF_TC_F_REPLACE, handle=HANDLE, priority=PRIORITY)
    check(library().bpf_tc_attach(ctypes.byref(_hook(hook)), ctypes.byref(options)), "attach filter", str(hook))


def _hook(hook: Hook) -> _TcHook:
    return _TcHook(ifindex=hook.interface, attach_point=TC_POINT[hook.direction])


def _drop_empty_queue(interface: int) -> None:
    """Remove the clsact queue if there is no filter left, whoever made it: an empty one does nothing."""
    netlink = rtnetlink.RouteSocket()
    with contextlib.closing(netlink):
        for parent in (TC_H_MIN_INGRESS, TC_H_MIN_EGRESS):
            if netlink.dump(RTM_GETTFILTER, _TCMSG.pack(0, 0, interface, 0, parent, 0), "filters"):
                return
        answer = netlink.execute([rtnetlink.Request(RTM_DELQDISC, 0, _TCMSG.pack(0, 0, interface, 0, TC_H_CLSACT, 0))])[0]
    if answer.code not in {0, errno.ENOENT}:
        raise KernelRefusedError("remove clsact queue of", f"interface {interface}", os.strerror(answer.code))
